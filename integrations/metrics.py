"""The logged metrics: sums over forwards on the device, and the numbers reported from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pre_kernels import PreHead

from .task_loss import BackwardLosses, sum_dtype
from .terms import Terms

SAMPLE = 256  # rows of a forward whose cosines are computed only for the log
NOT_LOGGED = ("pre_rows", "pre_forwards")
PATIENCE = 100  # forwards without a visual token, after which a training is suspicious


class Totals:
    """Named sums over the forwards since the last reset. They are packed in one tensor on the
    device, so only `read` syncs with the host.

    Args:
        layers: the number of each head's layer.
        loss: the name of the head's loss.
        skips: whether visual tokens with a nan or inf are left out and counted.

    Attributes:
        names: the names of the sums, in packed order: "count" of the terms, "tokens", "cosine" and
            "sampled" of the sampled rows, "loss_<l>" for each layer, "skipped" if `skips`, then
            those of `OWN`, `backward` and `gradient`.
        backward: the losses that were back-propagated with L_PRe in them.
        gradient: the norm of the head's gradient.
        forwards: the number of this process's forwards since the last reset.
        before: the number of those before it.
        resets: the number of resets.
    """

    # The sum of the forwards' own losses, before L_PRe was added; the number of such forwards; and
    # of those to which L_PRe was added.
    OWN = ("task", "task_forwards", "added_forwards")

    def __init__(self, layers: Sequence[int], loss: str, skips: bool) -> None:
        # Several heads of one layer get "_1", "_2", … behind its number.
        names = [
            f"{n}_{layers[: i + 1].count(n)}" if layers.count(n) > 1 else str(n)
            for i, n in enumerate(layers)
        ]
        self.layers = {name: f"loss_{name}" for name in names}
        self.loss = loss
        self.summed = ["count", "tokens", "cosine", "sampled", *self.layers.values()]
        if skips:
            self.summed.append("skipped")
        self.names = [*self.summed, *self.OWN, *BackwardLosses.NAMES, *GradientNorm.NAMES]
        self.backward = BackwardLosses()
        self.gradient = GradientNorm()
        self.forwards = 0
        self.before = 0
        self.resets = 0
        self._sums: Tensor | None = None  # those of `summed`; None before the first forward
        self._own: Tensor | None = None  # those of `OWN`; None before the first such forward
        self._contributed = False
        self._saw_tokens = False

    def add(self, losses: Sequence[Tensor], cosines: Sequence[Tensor], terms: Terms) -> None:
        """Add a forward, from what `Objective.losses` returned; no host sync."""
        device = losses[0].device
        dtype = sum_dtype(device)
        divisor = torch.as_tensor(terms.full_divisor).to(device)
        # With the cosine loss there are no sampled cosines.
        sampled = torch.zeros(2, dtype=dtype, device=device)
        if cosines:
            sampled = torch.stack([pair.to(device, dtype) for pair in cosines]).sum(0)
        values = dict(zip(("cosine", "sampled"), sampled, strict=True))
        values |= {"count": terms.count, "tokens": terms.tokens.sum()}
        for name, loss in zip(self.layers.values(), losses, strict=True):
            values[name] = loss.detach().to(device) * divisor
        if terms.skipped is not None:
            values["skipped"] = terms.skipped
        packed = torch.stack([values[name].to(device, dtype) for name in self.summed])
        self._sums = packed if self._sums is None else self._sums + packed
        self.forwards += 1

    def add_own_loss(
        self, own: Tensor, loss: Tensor | None = None, added: Tensor | None = None
    ) -> None:
        """Add a forward whose `output.loss` was `own`, and is `loss` after `added`, the part of
        L_PRe; all 0-d, no host sync. While PRe is off there are only `own` and no part."""
        value = own.detach().to(sum_dtype(own.device))
        one = torch.ones_like(value)
        sums = torch.stack([value, one, torch.zeros_like(value) if added is None else one])
        self._own = sums if self._own is None else self._own + sums
        if loss is not None and added is not None:
            self.backward.watch(loss, added)

    @property
    def contributed(self) -> bool:
        """Whether any forward had a term; reading this may be a host sync."""
        return self._contributed or bool(self._packed()[self.summed.index("count")] > 0)

    @property
    def in_vain(self) -> int:
        """The number of this process's forwards up to the last `read`, if they are many and none
        of them, in any process, had a visual token; else 0."""
        forwards = self.before + self.forwards
        return 0 if self._saw_tokens or forwards < PATIENCE else forwards

    def read(self, combine: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The metrics of `PreHandle.metrics`; one host sync. `combine` sums the packed tensor over
        processes."""
        packed = self._packed()
        own = packed.new_zeros(len(self.OWN)) if self._own is None else self._own.to(packed)
        parts = [packed, own, self.backward.packed(packed), self.gradient.packed(packed)]
        packed = torch.cat(parts)
        combined = packed if combine is None else combine(packed)
        sums = dict(zip(self.names, combined.tolist(), strict=True))
        count = sums["count"]
        self._contributed |= count > 0
        self.backward.loss, self.backward.added = (sums[n] for n in BackwardLosses.NAMES)
        self.backward.forwards = int(sums["added_forwards"])

        means = {
            layer: sums[name] / count if count else math.nan for layer, name in self.layers.items()
        }
        metrics = {"pre_loss": sum(means.values()) / len(means)}
        if len(means) > 1:
            metrics |= {f"pre_loss/layer_{layer}": mean for layer, mean in means.items()}
        if self.loss == "cosine":
            metrics["pre_cosine"] = -metrics["pre_loss"]
        else:
            sampled = sums["sampled"]
            metrics["pre_cosine"] = sums["cosine"] / sampled if sampled else math.nan
        if sums["task_forwards"]:
            metrics["task_loss"] = sums["task"] / sums["task_forwards"]
        metrics["pre_rows"] = count
        metrics["pre_tokens"] = sums["tokens"]
        metrics["pre_forwards"] = self.forwards
        if "skipped" in sums:
            metrics["pre_skipped"] = sums["skipped"]
        norm = self.gradient.read(sums)
        if norm is not None:
            metrics["pre_head_grad_norm"] = norm
        self._saw_tokens |= saw_tokens(metrics)
        return metrics

    def reset(self) -> None:
        """Forget the forwards, but neither `contributed` nor the gradient's norm."""
        self._sums = None
        self._own = None
        self.backward.sums = None
        self.before += self.forwards
        self.forwards = 0
        self.resets += 1

    def _packed(self) -> Tensor:
        if self._sums is None:
            if self._own is not None:  # PRe was off in all forwards
                return self._own.new_zeros(len(self.summed))
            return torch.zeros(len(self.summed), dtype=torch.double)
        return self._sums


def saw_tokens(metrics: Mapping[str, float]) -> bool:
    """Whether there were visual tokens, including those that were left out."""
    return bool(metrics["pre_rows"] or metrics.get("pre_skipped"))


def to_log(metrics: Mapping[str, float]) -> dict[str, float]:
    """The values of `PreHandle.metrics()` that go into a training's log."""
    return {name: value for name, value in metrics.items() if name not in NOT_LOGGED}


class GradientNorm:
    """The norm of the head's gradient as the last step of an optimizer took it, also if each
    process has a part of it. No host sync and no collective."""

    NAMES = ("gradient_square", "gradient_elements")  # the sums in `packed`

    def __init__(self) -> None:
        self.norm = torch.zeros(())
        self.elements_here = 0  # elements of the gradient in this process
        self.elements = 0  # elements of the whole gradient, each counted once

    def measure(self, head: nn.Module, optimizer: Any) -> None:
        """Measure the gradients that exist at the beginning of a step of `optimizer`."""
        gradients = [
            p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
            for p in head.parameters()
            if p.grad is not None
        ]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        # A fused optimizer unscales in its step, and has the GradScaler's scale.
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            self.norm = self.norm / scale.to(self.norm.device)
        self.elements_here = sum(gradient.numel() for gradient in gradients)
        self.elements = sum(
            _trained_elements(module) for module in head.modules() if isinstance(module, PreHead)
        )

    def packed(self, like: Tensor) -> Tensor:
        """The squared norm and the number of elements of this process's part, (2,) with dtype and
        device of `like`. Values of several processes may be added."""
        return torch.stack([self.norm.to(like).square(), like.new_tensor(self.elements_here)])

    def read(self, sums: Mapping[str, float]) -> float | None:
        """The norm, from the sums of `packed`, which may count each element several times; None if
        an element is missing."""
        seen = sums["gradient_elements"]
        if not seen >= self.elements > 0:
            return None
        return math.sqrt(sums["gradient_square"] * self.elements / seen)


def _trained_elements(head: PreHead) -> int:
    """The number of elements that train, independent of how they are split over processes."""
    trained = (name for name, p in head.named_parameters(recurse=False) if p.requires_grad)
    return sum(math.prod(head.shapes[name]) for name in trained)


@torch.no_grad()
def sample_cosine(
    head: nn.Module, hidden: Tensor, anchor: Tensor, mask: Tensor | None, impl: str
) -> Tensor:
    """The sum and the number of the cosines between predictions and anchors of at most `SAMPLE`
    rows, spread evenly; (2,), no host sync. For the logs of losses other than the cosine.

    Args:
        head: a `PreHead`.
        hidden: (..., d).
        anchor: hidden's leading shape + (z,), else (N, z) in selection order.
        mask: bool of hidden's leading shape with N rows set, or None for all rows.
    """
    flat = hidden.flatten(0, -2)
    target = anchor.flatten(0, -2)
    if mask is None:
        mask = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    size = min(SAMPLE, len(target))
    if size == 0:
        # Call the head on a row that does not count: a sharded head gathers its parameters at each
        # call, on all processes.
        size = 1
        mask = mask.new_zeros(1)
        flat = flat.new_zeros(1, flat.shape[-1])
        target = target.new_zeros(1, target.shape[-1])
    places = mask.flatten().cumsum(0)
    count = places[-1]
    # `ranks` says which of the N rows are taken.
    ranks = (torch.arange(size, device=flat.device) * (count / size).clamp(min=1)).long()
    valid = ranks < count
    rows = torch.searchsorted(places, ranks + 1).clamp(max=len(flat) - 1)
    matching = rows if len(target) == len(flat) else ranks.clamp(max=len(target) - 1)
    cosines = -head(flat[rows], target[matching], None, loss="cosine", reduction="none", impl=impl)
    # A row that does not count has a stand-in, whose cosine may be nan.
    return torch.stack([cosines.where(valid, 0).sum(), valid.sum().to(cosines.dtype)])
