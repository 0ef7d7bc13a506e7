"""PreHandle: PRe on one model, from the captured tensors of a forward to its loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .capture import Capture, CapturedForward
from .deferred import Deferred
from .gradient import GradientNorm
from .head_options import Training, number
from .objective import Losses, Objective
from .optimizers import Steps, ignore, listen, parameters, split, unwrapped
from .output import add_to_loss, keep_in_graph, logits, share, tensors
from .saved_keys import SavedKeys
from .watchdog import Watchdog

ATTRIBUTE = "pre_head"


class PreHandle:
    """What `apply_pre` returns; as a context manager it removes itself at the end.

    Attributes:
        enabled: False turns PRe off without removing it.
        weight: λ, before the schedule.
        progress: where in the training the next step is, 0..1; the schedule reads it.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        head: nn.Module,
        weight: float,
        training: Training,
        labels: str | None,
        as_layer: bool = False,
    ) -> None:
        self.weight, self._progress, self.enabled = weight, 0.0, True
        self.notices = objective.parts.notices
        self._model, self._objective, self._training = model, objective, training
        self._several = isinstance(head, nn.ModuleList)
        self._was_peft = getattr(model, "peft_config", None) is not None
        self._sums: Tensor | None = None
        self._forwards = 0
        self._gradient = GradientNorm()
        self._watchdog = Watchdog(self.notices, labels)
        self._steps = Steps()
        self._labels = labels
        self._contributed = self._progressed = False
        self._without: str | None = None  # why a forward that may be trained has no term
        self._deferred: Deferred | None = None
        self._own: Tensor | None = None  # what loss() returns
        self._as_layer = as_layer  # the head has its layer's dtype
        self._dtypes = {name: p.dtype for name, p in head.named_parameters()}

        model.add_module(ATTRIBUTE, head)
        self._saved_keys = SavedKeys(model, ATTRIBUTE)
        listen(self)
        self._capture: Capture | None = Capture(
            model,
            objective.parts,
            objective.layers,
            self._start,
            self._finish,
            self._missed,
            self._skipped,
        )

    @property
    def model(self) -> nn.Module:
        """The module it is attached to."""
        return self._model

    @property
    def head(self) -> Any:
        """The predictor: a `PreHead`, or a ModuleList of one per layer. Looked up each time: PEFT
        may copy it."""
        if self._capture is None:
            raise RuntimeError(
                "handle: it was removed, and its head with it; use the head before remove()"
            )
        return getattr(self._model, ATTRIBUTE)

    @property
    def weight(self) -> float:
        """λ, the weight of L_PRe in the loss."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = number("weight", value)

    @property
    def progress(self) -> float:
        """Where in the training the next step is, 0..1; `patch_trainer` sets it to the middle of
        each step."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        if number("progress", value) > 1:
            raise ValueError(f"progress: got {value}, want 0..1")
        self._progress, self._progressed = float(value), True

    @property
    def scheduled_weight(self) -> float:
        """λ as the schedule has it at `progress`. At 0 the head is not in the graph, which DDP has
        to be told of."""
        return self._weight * self._training.factor(self._progress)

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
            # images weigh the same at level "image" whatever `weighting` says
            "weighting": "image" if self._objective.level == "image" else self._objective.weighting,
            "anchor": self._objective.anchor if named else "callable",
        }

    def metrics(
        self, reset: bool = True, combine: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, float]:
        """What was seen since the last reset; reading it is the only host sync.

        - "pre_loss": mean L_PRe per visual token (per image at level "image"; nan without any), the
          layers averaged; "pre_loss/layer_<l>" for each of several;
        - "pre_cosine": mean cosine between predictions and anchors; for the losses that are not
          -cosine, of at most `cosine.SAMPLE` rows of each forward;
        - "pre_rows": the number of terms; "pre_tokens": of visual tokens; "pre_forwards": of this
          process's forwards;
        - "pre_skipped": of visual tokens left out for a nan or inf, with `nonfinite="skip"`; they
          are not in the above;
        - "pre_head_grad_norm": of the head's gradient as the last optimizer step took it (unscaled,
          clipped), once an optimizer is watched (`watch`, `patch_trainer`) and has the gradients;
          under FSDP1 with `combine` only;
        - "pre_weight": λ of the last step, if it has a schedule.

        `combine` sums the totals over processes.
        """
        totals = torch.cat([self._totals(), self._gradient.sums(self._totals())])
        whole = (totals if combine is None else combine(totals)).tolist()
        count, tokens, cosine, sampled, *sums, square, number = whole
        skipped = sums.pop() if self._objective.nonfinite == "skip" else None
        self._contributed |= count > 0
        means = [s / count if count else math.nan for s in sums]
        found = {"pre_loss": sum(means) / len(means)}
        if len(means) > 1:
            found |= {
                f"pre_loss/layer_{n}": mean for n, mean in zip(self.layers, means, strict=True)
            }
        if self._objective.loss == "cosine":
            found["pre_cosine"] = -found["pre_loss"]
        else:
            found["pre_cosine"] = cosine / sampled if sampled else math.nan
        found |= {"pre_rows": count, "pre_tokens": tokens, "pre_forwards": self._forwards}
        if skipped is not None:
            found["pre_skipped"] = skipped
        if (norm := self._gradient.of(square, number)) is not None:
            found["pre_head_grad_norm"] = norm
        if self._training.scheduled:
            found["pre_weight"] = self.scheduled_weight
        if reset:
            self._sums, self._forwards = None, 0
        return found

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the head's parameters that require grad, with `head_lr` and
        `head_weight_decay` if given.

        First the weights, then the biases, which are not decayed. Leave these parameters out of
        other groups.
        """
        return self._training.groups(self.head.named_parameters())

    @property
    def own_rates(self) -> bool:
        """Whether `head_lr` or `head_weight_decay` was given."""
        return (self._training.head_lr, self._training.head_weight_decay) != (None, None)

    def watch(self, optimizer: Any) -> RemovableHandle:
        """Measure the norm of the head's gradient at each step of `optimizer`, for `metrics`, until
        it is removed.

        An optimizer that accelerate or DeepSpeed has wrapped is unwrapped; DeepSpeed's steps copies
        of the gradients, so there is no norm of those.

        Raises:
            TypeError: for what is no `torch.optim.Optimizer` and has none inside.
        """
        inner = unwrapped(optimizer)
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: got {type(optimizer).__name__}, want a torch.optim.Optimizer"
            )
        mine, others = split(self._model, self.head)
        held = {id(p) for p in parameters(inner)}
        if held & others and not held & mine.keys():
            self.notices.warn("optimizer without the head", optimizer=type(inner).__name__)
        return inner.register_step_pre_hook(self._measure)

    def save(self, directory: Any, model: nn.Module | None = None) -> None:
        """Write the head to `directory`: pre_head.safetensors and pre_head.json. `save_pretrained`
        leaves it out.

        Rank 0 writes. Where the head is split over processes (FSDP, ZeRO-3) every process has to
        call it: the parts are gathered, and all return when the files are there; elsewhere (DDP,
        ZeRO-1, ZeRO-2) the others return at once and need not call it. `model`: under FSDP1 its
        wrapper around the model, which alone can gather.

        Raises:
            RuntimeError: if the head is split in a way that is not known.
            OSError: on every process, if rank 0 cannot write.
        """
        from .checkpoint import save

        save(self, directory, model)

    def load(self, directory: Any, model: nn.Module | None = None) -> None:
        """Read the head that `save` wrote, into this handle's: bit for bit, under any number of
        processes.

        Every process reads the files and takes its part; where the head is split every process has
        to call it. `model` as in `save`.

        Raises:
            FileNotFoundError, ValueError: naming what is missing, broken, or differs from this
                handle; on every process that takes part.
        """
        from .checkpoint import load

        load(self, directory, model)

    def remove(self) -> None:
        """Take hooks and head off again: the model is what it was. Calling it twice is fine."""
        if self._capture is None:
            return
        self._capture.remove()
        self._capture = self._own = None
        ignore(self)
        self._saved_keys.remove()
        delattr(self._model, ATTRIBUTE)

    def __enter__(self) -> PreHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def count(self, inputs: dict[str, Any]) -> Tensor:
        """The number of terms (visual tokens, or images) in the loss of a forward with these
        arguments, 0-d."""
        return self._objective.count(inputs)

    def loss(self) -> Tensor:
        """With `labels=None`: λ · L_PRe of the last forward in training, 0-d, to be added to the
        loss; else 0.

        Each forward's is given once. It is the mean over the forward's visual tokens: weigh it like
        the loss that it is added to.

        Raises:
            RuntimeError: if the handle adds L_PRe to `output.loss` itself.
        """
        if self._labels is not None:
            raise RuntimeError(
                f"labels: is {self._labels!r}, so L_PRe is added to output.loss where the forward gets that argument; "
                "handle.loss() wants apply_pre(..., labels=None)"
            )
        found, self._own = self._own, None
        return torch.zeros(()) if found is None else found

    def excluded(self) -> contextlib.AbstractContextManager[None]:
        """Inside it no `state_dict()` has the head's keys, for ways of saving that know nothing of
        it.

        `save_pretrained` needs it not. `with handle.excluded(): accelerator.save_model(model,
        folder)`.
        """
        return self._saved_keys.excluded()

    @contextlib.contextmanager
    def defer(
        self,
        divisor: Tensor | float | None,
        micro_batches: int = 1,
        counted: Tensor | None = None,
        alone: bool = False,
    ) -> Iterator[Deferred]:
        """Inside it forwards don't add to `output.loss`: λ · L_PRe gathers in what this yields, see
        `Deferred`."""
        self._deferred = Deferred(divisor, micro_batches, counted, alone)
        try:
            yield self._deferred
        finally:
            self._deferred = None

    def restore_dtypes(self) -> None:
        """Cast the head's parameters back to the dtypes they were made in, where somebody cast
        them, and say so.

        A head without a `head_dtype` may be cast with its layer.
        """
        changed = {}
        parts = self._objective.parts
        followed = self.layers if self._as_layer else ()
        now = {parts.dtype_and_device(number)[0] for number in followed}
        for name, parameter in self.head.named_parameters():
            made = next(
                (n for n in self._dtypes if f".{name}".endswith(f".{n}")), None
            )  # PEFT puts names before it
            dtype = parameter.dtype if made is None else self._dtypes[made]
            # FSDP2 has its own rules
            if (
                parameter.dtype != dtype
                and now != {parameter.dtype}
                and not hasattr(parameter, "full_tensor")
            ):
                changed[name] = parameter.dtype, dtype
                parameter.data = parameter.data.to(dtype)
        if changed:
            dtype, wanted = next(iter(changed.values()))
            self.notices.warn("head recast", names=", ".join(changed), dtype=dtype, wanted=wanted)

    def advise(self, advice: str | None) -> None:
        """What to do where a trainer leaves L_PRe out of its loss; None: what is said without a
        trainer's patch."""
        self._watchdog.advice = advice or self._watchdog.default

    def _start(self, module: nn.Module, inputs: dict[str, Any]) -> bool:
        self._without = None
        if torch.is_grad_enabled():
            self._own = None  # nobody asked for it; its graph is not kept beside this forward's
        if module.training and self.enabled and self.weight and torch.is_grad_enabled():
            self._check_steps()
        if not self._wanted():
            return False
        # a Trainer with its own loss pops the labels
        labelled = (
            self._labels is None
            or inputs.get(self._labels) is not None
            or self._deferred is not None
        )
        if not module.training:
            self._without = "eval mode" if labelled else None
        elif not labelled:
            self._without = "no labels"
        self._watchdog.check()
        if self._without is not None or not labelled:
            return False
        self._check_frozen()
        return True

    def _wanted(self) -> bool:
        return bool(self.enabled and self.scheduled_weight and torch.is_grad_enabled())

    def _skipped(self, output: Any) -> None:
        if self._without is not None:
            self._watchdog.watch_without(self._without, tensors(output))

    def new_training(self) -> None:
        """What was said and seen of another training is forgotten."""
        self.notices.forget()
        self._steps = Steps()

    def stepped(self, optimizer: Any) -> None:
        """An optimizer's step begins, see `optimizers.listen`."""
        self._steps.see(optimizer, self._model, self.head)

    def _check_steps(self) -> None:
        """After an optimizer's first step: that it has the head, and that a schedule moves on."""
        if not self._steps.count:
            return
        if self._training.scheduled and not self._progressed:
            self.notices.warn("no progress", weight=self.scheduled_weight)
        left_out = self._steps.verdict()
        if left_out is not None and not self.notices.given & {
            "optimizer refuses",
            "optimizer given",
        }:
            self.notices.warn(
                f"optimizer without the {left_out}", optimizer=", ".join(sorted(self._steps.kinds))
            )

    def _check_frozen(self) -> None:
        trained = [
            p.requires_grad for p in self.head.parameters()
        ]  # none where FSDP1 keeps them flat
        if any(trained) or not trained:
            if "frozen head" in self.notices.given:  # it is trained now, if the optimizer has it
                self.notices.given.discard("frozen head")
                self._steps.forget()
            return
        if self._was_peft or getattr(self._model, "peft_config", None) is None:
            self.notices.warn("frozen head")
            return
        other = (
            "" if self._several else f', or put "{ATTRIBUTE}" in modules_to_save'
        )  # which takes no ModuleList
        raise RuntimeError(
            f"model: it was wrapped in PEFT after apply_pre, which froze `{ATTRIBUTE}`, so the head would never "
            f"train; call apply_pre on the PeftModel instead{other}"
        )

    def _missed(self, text: nn.Module) -> None:
        if text.training and self._wanted():
            self._check_frozen()
            self.notices.warn("called inside", model=type(self._model).__name__)

    def _finish(self, output: Any, seen: CapturedForward) -> Any:
        deferred = self._deferred
        divisor = None if deferred is None else deferred.divisor
        heads = self.head if self._several else [self.head]
        found = self._objective.losses(
            seen, heads, divisor, deferred is not None and deferred.alone
        )
        device = found.layers[0].device
        self._record(found, device)
        if not any(hidden.requires_grad for hidden in seen.hidden.values()):
            self.notices.warn("nothing below trains", layers=", ".join(map(str, self.layers)))

        total = torch.stack([loss.to(device) for loss in found.layers]).mean()
        term = self.scheduled_weight * total
        if deferred is not None:
            deferred.add(term, found.counted)
        elif self._labels is None:
            self._own = term
        else:
            term = term * share(seen.inputs, self._labels, device, self._objective.group)
            output = add_to_loss(output, term)
        self._watchdog.watch(term, [*seen.hidden.values(), *logits(output)])
        return output if deferred is None and self._labels else keep_in_graph(output, total)

    def _record(self, found: Losses, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        scale = torch.as_tensor(found.full_divisor)
        cosines = [pair.to(device, wide) for pair in found.cosines]
        new = torch.stack(
            [
                found.count.to(device, wide),
                found.tokens.to(device, wide),
                *(
                    torch.stack(cosines).sum(0)
                    if cosines
                    else torch.zeros(2, dtype=wide, device=device)
                ),
                *((loss.detach().to(device) * scale.to(device)).to(wide) for loss in found.layers),
                *(() if found.skipped is None else (found.skipped.to(device, wide),)),
            ]
        )
        self._sums = new if self._sums is None else self._sums + new
        self._forwards += 1

    def _totals(self) -> Tensor:
        size = 4 + len(self.layers) + (self._objective.nonfinite == "skip")
        return torch.zeros(size, dtype=torch.double) if self._sums is None else self._sums

    def _measure(self, optimizer: Any, *_: Any) -> None:
        if self._capture is not None:  # it may outlive PRe
            self._gradient.measure(self.head, optimizer)


def find_handle(model: nn.Module) -> PreHandle | None:
    """The handle attached to `model`, around it or inside it; None if there is none. Works on deep
    copies too."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            capture = getattr(hook, "__self__", None)
            if isinstance(capture, Capture):
                owner = getattr(capture.finish, "__self__", None)
                if isinstance(owner, PreHandle):
                    return owner
    return None
