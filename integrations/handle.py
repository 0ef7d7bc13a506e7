"""PreHandle: PRe on one model, from the captured tensors of a forward to its loss."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, Seen
from .objective import Objective
from .output import add_to_loss, share

ATTRIBUTE = "pre_head"


class PreHandle:
    """What `apply_pre` returns; as a context manager it removes itself at the end.

    Attributes:
        enabled: False turns PRe off without removing it.
        weight: λ.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        head: nn.Module,
        weight: float,
    ) -> None:
        self.weight = weight
        self.enabled = True
        self._model, self._objective = model, objective
        self._several = isinstance(head, nn.ModuleList)
        self._was_peft = getattr(model, "peft_config", None) is not None
        self._sums: Tensor | None = None
        self._forwards = 0
        self._contributed = False
        self._warned = False
        self._deferred: Deferred | None = None

        model.add_module(ATTRIBUTE, head)
        self._unsaved = _ignore_on_save(model, head)
        self._capture: Capture | None = Capture(
            model, objective.parts, objective.layers, self._start, self._finish, self._missed
        )

    @property
    def head(self) -> Any:
        """The predictor: a `PreHead`, or a ModuleList of one per layer. Looked up each time: PEFT may copy it."""
        return getattr(self._model, ATTRIBUTE)

    @property
    def weight(self) -> float:
        """λ, the weight of L_PRe in the loss."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"weight: got {type(value).__name__}, want a number")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"weight: got {value}, want a finite number ≥ 0")
        self._weight = float(value)

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers, one head each."""
        return self._objective.layers

    @property
    def contributed(self) -> bool:
        """Whether a forward ever had a term, a visual token; reading it may be a host sync."""
        return self._contributed or bool(self._totals()[0] > 0)

    def settings(self) -> dict[str, Any]:
        """What the heads were made for, as it is kept beside a saved head."""
        named = isinstance(self._objective.anchor, str)
        return {
            "layers": list(self.layers),
            "several": self._several,
            "level": self._objective.level,
            "anchor": self._objective.anchor if named else "callable",
        }

    def metrics(self, reset: bool = True, combine: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """What was seen since the last reset; reading it is the only host sync.

        "pre_loss": mean L_PRe per visual token (per image at level "image"; nan without any), the layers averaged, and
        "pre_loss/layer_<l>" for each of several; "pre_rows": the number of those; "pre_forwards": of forwards.
        `combine` sums the totals over processes.
        """
        totals = self._totals()
        count, *sums = (totals if combine is None else combine(totals)).tolist()
        self._contributed |= count > 0
        means = [s / count if count else math.nan for s in sums]
        found = {"pre_loss": sum(means) / len(means)}
        if len(means) > 1:
            found |= {f"pre_loss/layer_{n}": mean for n, mean in zip(self.layers, means, strict=True)}
        found |= {"pre_rows": count, "pre_forwards": self._forwards}
        if reset:
            self._sums, self._forwards = None, 0
        return found

    def save(self, directory: Any) -> None:
        """Write the head to `directory`: pre_head.safetensors and pre_head.json. `save_pretrained` leaves it out."""
        from .checkpoint import save

        save(self, directory)

    def load(self, directory: Any) -> None:
        """Read the head that `save` wrote, into this handle's.

        Raises:
            FileNotFoundError, ValueError: naming what is missing, broken, or differs from this handle.
        """
        from .checkpoint import load

        load(self, directory)

    def remove(self) -> None:
        """Take hooks and head off again: the model is what it was. Calling it twice is fine."""
        if self._capture is None:
            return
        self._capture.remove()
        self._capture = None
        delattr(self._model, ATTRIBUTE)
        if self._unsaved is not None:
            vars(self._model).pop("_keys_to_ignore_on_save", None)
            vars(self._model).update(self._unsaved)

    def __enter__(self) -> PreHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def count(self, inputs: dict[str, Any]) -> Tensor:
        """The number of terms (visual tokens, or images) in the loss of a forward with these arguments, 0-d."""
        return self._objective.count(inputs)

    @contextlib.contextmanager
    def defer(self, divisor: Tensor | float) -> Iterator[Deferred]:
        """Inside it forwards don't add to `output.loss`: `weight` · Σℓ / `divisor` gathers in what this yields."""
        self._deferred = Deferred(divisor)
        try:
            yield self._deferred
        finally:
            self._deferred = None

    def _start(self, inputs: dict[str, Any]) -> bool:
        if not (self.enabled and self._weight and self._model.training and torch.is_grad_enabled()):
            return False
        if inputs.get("labels") is None and self._deferred is None:  # a Trainer with its own loss pops the labels
            return False
        self._check_frozen()
        return True

    def _check_frozen(self) -> None:
        if self._was_peft or getattr(self._model, "peft_config", None) is None:
            return
        if not any(p.requires_grad for p in self.head.parameters()):
            raise RuntimeError(
                f"model: it was wrapped in PEFT after apply_pre, which froze `{ATTRIBUTE}`, so the head would never "
                f'train; call apply_pre on the PeftModel instead, or put "{ATTRIBUTE}" in modules_to_save'
            )

    def _missed(self) -> None:
        if not (self.enabled and self._weight and self._model.training and torch.is_grad_enabled()):
            return
        self._check_frozen()
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"PRe: the text model ran in training outside a call of {type(self._model).__name__}, to which PRe is "
                "attached, so L_PRe is not added; attach to the module that is called",
                stacklevel=2,
            )

    def _finish(self, output: Any, seen: Seen) -> Any:
        deferred = self._deferred
        divisor = None if deferred is None else deferred.divisor
        heads = self.head if self._several else [self.head]
        losses, count = self._objective.losses(seen, heads, divisor)
        device = losses[0].device
        losses = [loss.to(device) for loss in losses]
        self._record(losses, count.to(device), divisor)

        total = torch.stack(losses).mean()
        if deferred is not None:
            deferred.terms.append(self._weight * total)
            return add_to_loss(output, 0 * total, required=False)  # DDP looks for the head in the graph of the output
        return add_to_loss(output, self._weight * share(seen.inputs, device) * total, required=True)

    def _record(self, losses: list[Tensor], count: Tensor, divisor: Tensor | float | None) -> None:
        scale = count if divisor is None else torch.as_tensor(divisor, device=count.device)
        wide = torch.float32 if count.device.type == "mps" else torch.float64
        new = torch.stack([count.to(wide), *((loss.detach() * scale).to(wide) for loss in losses)])
        self._sums = new if self._sums is None else self._sums + new
        self._forwards += 1

    def _totals(self) -> Tensor:
        return torch.zeros(1 + len(self.layers), dtype=torch.double) if self._sums is None else self._sums


class Deferred:
    """The terms of the forwards inside `PreHandle.defer`, and the number Σℓ is divided by."""

    def __init__(self, divisor: Tensor | float) -> None:
        self.divisor = divisor
        self.terms: list[Tensor] = []
        self.added: Tensor | float = 0.0

    def take(self) -> list[Tensor]:
        """The terms, to be added to the loss that is back-propagated; the next call gets none of them."""
        terms, self.terms = self.terms, []
        self.added = self.added + sum(term.detach() for term in terms)
        return terms


def find_handle(model: nn.Module) -> PreHandle | None:
    """The handle attached to `model`, around it or inside it; None if there is none. Works on deep copies too."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            capture = getattr(hook, "__self__", None)
            if isinstance(capture, Capture):
                owner = getattr(capture.finish, "__self__", None)
                if isinstance(owner, PreHandle):
                    return owner
    return None


def _ignore_on_save(model: nn.Module, head: nn.Module) -> dict[str, Any] | None:
    """Keep the head out of `save_pretrained`; returns what `remove` puts back, None if nothing changed."""
    if not hasattr(type(model), "_keys_to_ignore_on_save"):
        return None
    before = {k: v for k, v in vars(model).items() if k == "_keys_to_ignore_on_save"}
    keys = {f"{ATTRIBUTE}.{name}" for name in head.state_dict()}
    found: Any = model._keys_to_ignore_on_save
    vars(model)["_keys_to_ignore_on_save"] = set(found or ()) | keys
    return before
