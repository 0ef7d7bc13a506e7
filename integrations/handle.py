"""PreHandle: PRe on one model, from the captured tensors of a forward to its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import agreement, checkpoint
from .capture import Capture, CapturedForward
from .deferred import Deferred, Divisor
from .description import describe
from .distributed import sharing_a_sequence
from .head_checks import HeadChecks
from .head_options import HeadOptions, ScheduledWeight
from .metrics import Totals
from .objective import Objective
from .optimizers import ignore, listen, unwrapped
from .output import add_to_loss, keep_in_graph, logits, loss_share, own_loss, tensors
from .saved_keys import SavedKeys
from .watchdog import Watchdog

ATTRIBUTE = "pre_head"


class PreHandle(ScheduledWeight):
    """PRe on one model, returned by `apply_pre`. As a context manager it removes itself at the end.

    Attributes:
        enabled: False turns PRe off without removing it.
        weight: λ, before the schedule.
        progress: the position of the next step in the training, 0..1; the schedule reads it.
        scheduled_weight: λ by the schedule at `progress`. At 0 the head is not in the graph, so DDP
            needs `find_unused_parameters=True`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        head: nn.Module,
        weight: float,
        options: HeadOptions,
        labels: str | None,
        as_layer: bool = False,
    ) -> None:
        super().__init__(weight, options)
        self.enabled = True
        self.notices = objective.parts.notices
        self._model = model
        self._objective = objective
        self._several = isinstance(head, nn.ModuleList)
        self.totals = Totals(objective.layers, objective.loss, objective.nonfinite == "skip")
        self._watchdog = Watchdog(self.notices, labels)
        self._checks = HeadChecks(model, head, ATTRIBUTE, self.notices)
        self._labels = labels
        self._deferred: Deferred | None = None
        self._own: Tensor | None = None  # the return value of loss()
        self._plain = False  # whether this forward is trained on its loss while PRe is off
        self._as_layer = as_layer  # whether the head was made in its layer's dtype
        self._agreed = False  # whether it was compared with the handles of other processes

        model.add_module(ATTRIBUTE, head)
        self._saved_keys = SavedKeys(model, ATTRIBUTE)
        listen(self)
        self._capture: Capture | None = Capture(
            model,
            objective.parts,
            tuple(dict.fromkeys(objective.layers)),
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
        """The predictor: a `PreHead`, or a ModuleList with one per layer or target."""
        # PEFT may copy the head, so the attribute is read each time.
        if self._capture is None:
            raise RuntimeError(
                "handle: it was removed, and its head with it; use the head before remove()"
            )
        return getattr(self._model, ATTRIBUTE)

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers, one head each."""
        return self._objective.layers

    @property
    def depth(self) -> int:
        """The number of the model's decoder layers."""
        return self._objective.parts.depth

    @property
    def contributed(self) -> bool:
        """Whether any forward had a term (a visual token). Reading this may be a host sync."""
        return self.totals.contributed

    def settings(self) -> dict[str, Any]:
        """The settings that a saved head has to match; `save` writes them beside it."""
        return self._objective.settings(self._several)

    def metrics(
        self, reset: bool = True, combine: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, float]:
        """The metrics of the forwards since the last reset. Reading them is the only host sync. It
        warns of a training whose forwards had no visual token so far.

        - "task_loss": mean over forwards in training of `output.loss` without λ · L_PRe, also while
          PRe is off. Absent with `labels=None` or a trainer's own loss (`patch_trainer` logs its).
        - "pre_loss": mean L_PRe per term, without λ, averaged over layers. A term is a visual
          token, or an image at level or weighting "image"; without terms it is nan.
          "pre_loss/layer_<l>" is the same for each of several layers, and "pre_loss/layer_<l>_1",
          "…_2" for each of a layer's several targets.
        - "pre_cosine": mean cosine between predictions and anchors. If the loss is not the cosine,
          of at most `metrics.SAMPLE` rows of each forward.
        - "pre_rows", "pre_tokens": the number of terms, of visual tokens. "pre_forwards": the
          number of this process's forwards.
        - "pre_skipped": with `nonfinite="skip"`, the number of visual tokens that were left out for
          a nan or inf; no other metric has them.
        - "pre_head_grad_norm": the norm of the head's gradient as the last optimizer step took it,
          unscaled and clipped. It needs `watch` or `patch_trainer`, and under FSDP `combine`.
        - "pre_weight": λ of the last step, if it has a schedule.

        Args:
            reset: whether the next call starts from zero.
            combine: sums the packed totals, a 1-d tensor, over processes.
        """
        metrics = self.totals.read(combine)
        if self.totals.in_vain:
            self.notices.warn("no visual tokens", count=self.totals.in_vain)
        if self._options.scheduled:
            metrics["pre_weight"] = self.scheduled_weight
        if reset:
            self.totals.reset()
        return metrics

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups for the head's parameters that require grad, with `head_lr` and
        `head_weight_decay` if given.

        The weights come first, then the biases, which are not decayed. Leave these parameters out
        of other groups.
        """
        return self._options.groups(self.head.named_parameters())

    @property
    def own_rates(self) -> bool:
        """Whether `head_lr` or `head_weight_decay` was given."""
        return (self._options.head_lr, self._options.head_weight_decay) != (None, None)

    def watch(self, optimizer: Any) -> RemovableHandle:
        """Measure the norm of the head's gradient at each step of `optimizer`, for `metrics`, until
        the returned handle is removed.

        Wrappers of accelerate and DeepSpeed are unwrapped. DeepSpeed's optimizer steps copies of
        the gradients, so their norm is not measured.

        Raises:
            TypeError: if `optimizer` is not a `torch.optim.Optimizer` and has none inside.
        """
        inner = unwrapped(optimizer)
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: got {type(optimizer).__name__}, want a torch.optim.Optimizer"
            )
        if self._checks.leaves_out_head(inner, self.head):
            self.notices.warn("optimizer without the head", optimizer=type(inner).__name__)
        return inner.register_step_pre_hook(self._measure)

    def save(
        self, directory: Any, model: nn.Module | None = None, *, writes: bool | None = None
    ) -> None:
        """Write the head and averages of anchors, which `save_pretrained` leaves out:
        pre_head.safetensors, pre_head.json.

        Where the head is split over processes (FSDP, ZeRO-3), every process has to call this: the
        parts are gathered, and all return when the files exist. Elsewhere only rank 0 needs to.

        Args:
            directory: it is made if needed.
            model: under FSDP1 the wrapper around the model, which is needed to gather the parts.
            writes: whether this process writes the files. None: if it is rank 0.

        Raises:
            RuntimeError: if the head is split in an unknown way.
            OSError: on every process, if rank 0 cannot write.
        """
        where = self._where(model)
        checkpoint.save(self.head, self.settings(), directory, writes=writes, **where)

    def load(self, directory: Any, model: nn.Module | None = None) -> None:
        """Read the head that `save` wrote into this handle's head, bit for bit, under any number of
        processes.

        Every process reads the files and takes its part. Where the head is split, every process has
        to call this. `model` as in `save`.

        Raises:
            FileNotFoundError, ValueError: naming what is missing or broken, or differs from this
                handle; on every process that takes part.
        """
        checkpoint.load(self.head, self.settings(), directory, **self._where(model))

    def _where(self, model: nn.Module | None) -> dict[str, Any]:
        averages = self._objective.averages
        return {"attached": self._model, "wrapper": model, "averages": averages}

    def remove(self) -> None:
        """Take hooks and head off: the model is what it was. Calling this twice is fine."""
        if self._capture is None:
            return
        self._capture.remove()
        self._capture = None
        self._own = None
        ignore(self)
        self._saved_keys.remove()
        delattr(self._model, ATTRIBUTE)

    def __repr__(self) -> str:
        return describe(self, self._objective, self._labels, removed=self._capture is None)

    def __enter__(self) -> PreHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def count(self, inputs: dict[str, Any]) -> Tensor:
        """The number of terms (visual tokens or images) of a forward with these arguments, 0-d."""
        return self._objective.count(inputs)

    def loss(self) -> Tensor:
        """With `labels=None`: λ · L_PRe of the last forward in training, 0-d, to add to your loss.

        Each forward's is returned once; after that, and without one, this is 0. It is the mean over
        the forward's visual tokens: weigh it like the loss that it is added to.

        Raises:
            RuntimeError: if the handle adds L_PRe to `output.loss` itself.
        """
        if self._labels is not None:
            raise RuntimeError(
                f"labels: is {self._labels!r}, so L_PRe is added to output.loss where the forward "
                "gets that argument; handle.loss() needs apply_pre(..., labels=None)"
            )
        loss, self._own = self._own, None
        return torch.zeros(()) if loss is None else loss

    def excluded(self) -> contextlib.AbstractContextManager[None]:
        """Inside it no `state_dict()` has the head's keys: `with handle.excluded():
        accelerator.save_model(model, folder)`. `save_pretrained` does not need this."""
        return self._saved_keys.excluded()

    @contextlib.contextmanager
    def defer(
        self,
        divisor: Divisor,
        micro_batches: int = 1,
        counted: Tensor | None = None,
        ungrouped: bool = False,
        alone: bool = False,
    ) -> Iterator[Deferred]:
        """Inside it λ · L_PRe goes to the yielded `Deferred` (of these arguments), not the loss."""
        self._deferred = Deferred(divisor, micro_batches, counted, ungrouped, alone)
        try:
            yield self._deferred
        finally:
            self._deferred = None

    def restore_dtypes(self) -> None:
        """Cast the head's parameters back to the dtypes they were made in, if somebody cast them,
        and warn. A head without a `head_dtype` may be cast together with its layer."""
        followed = self.layers if self._as_layer else ()
        dtypes = {self._objective.parts.dtype_and_device(number)[0] for number in followed}
        self._checks.restore_dtypes(self.head, dtypes)

    def advise(self, advice: str | None) -> None:
        """Set the advice of the warning that a trainer leaves L_PRe out of its loss; None restores
        the default."""
        self._watchdog.advice = advice or self._watchdog.default

    def new_training(self) -> None:
        """A training begins: forget the warnings and observations of another one."""
        self.notices.forget()
        self._checks.new_training()

    def agree(self, whole: bool) -> None:
        """Compare this handle with those of other processes; see `agreement.compare`."""
        own = agreement.settings(self, self._objective, self._options, self._labels)
        agreement.compare(self.head, own, self._objective, whole, first=not self._agreed)
        self._agreed = True

    def stepped(self, optimizer: Any) -> None:
        """An optimizer's step begins; `optimizers.listen` calls this."""
        self._checks.stepped(optimizer, self.head, bool(self.enabled and self.scheduled_weight))
        for average in self._objective.averages:
            average.stepped(optimizer, self._model)

    def _start(self, module: nn.Module, inputs: dict[str, Any]) -> bool:
        self._watchdog.reason = None
        self._checks.called()
        if torch.is_grad_enabled():
            # Nobody asked for the last forward's L_PRe; drop its graph before this one is made.
            self._own = None
        if module.training and self.enabled and self.weight and torch.is_grad_enabled():
            self._check_steps()
        wanted = self._wanted()
        labels = self._labels is not None and inputs.get(self._labels) is not None
        self._plain = labels and module.training and torch.is_grad_enabled() and not wanted
        if not self._agreed and module.training and torch.is_grad_enabled():
            self.agree(whole=False)
        if not wanted:
            return False
        # A Trainer with its own loss removes the labels, but defers L_PRe.
        labelled = labels or self._labels is None or self._deferred is not None
        if not self._watchdog.begin(module.training, labelled):
            return False
        self._checks.check_frozen(self.head)
        return True

    def _wanted(self) -> bool:
        return bool(self.enabled and self.scheduled_weight and torch.is_grad_enabled())

    def _skipped(self, output: Any) -> None:
        self._watchdog.watch_without(tensors(output))
        own = own_loss(output) if self._plain else None
        if own is not None:
            self.totals.add_own_loss(own)

    def _check_steps(self) -> None:
        """After an optimizer's first step: check that it has the head, and that λ moves."""
        if not self._checks.steps.count:
            return
        if self._options.scheduled and not self._progressed:
            self.notices.warn("no progress", weight=self.scheduled_weight)
        self._checks.check_steps()

    def _missed(self, text: nn.Module) -> None:
        if text.training and self._wanted():
            self._checks.check_frozen(self.head)
            self.notices.warn("called inside", model=type(self._model).__name__)

    def _finish(self, output: Any, seen: CapturedForward) -> Any:
        deferred = self._deferred
        heads = self.head if self._several else [self.head]
        losses, cosines, terms = self._objective.losses(seen, heads, deferred)
        self.totals.add(losses, cosines, terms)
        if self._objective.over_images and sharing_a_sequence() > 1:
            self.notices.warn("cut images", option=self._objective.over_images)
        if not any(hidden.requires_grad for hidden in seen.hidden.values()):
            self.notices.warn("nothing below trains", layers=", ".join(map(str, self.layers)))

        device = losses[0].device
        total = torch.stack([loss.to(device) for loss in losses]).mean()
        term = self.scheduled_weight * total
        if deferred is not None:
            deferred.add(term, terms.counted)
        elif self._labels is None:
            self._own = term
        else:
            term = term * loss_share(seen.inputs, self._labels, device, self._objective.group)
            own = own_loss(output)
            output = add_to_loss(output, term)
            loss = own_loss(output)
            assert own is not None
            assert loss is not None
            self.totals.add_own_loss(own, loss, term)
        self._watchdog.watch(term, [*seen.hidden.values(), *logits(output)])
        added = deferred is None and self._labels is not None
        return output if added else keep_in_graph(output, total)

    def _measure(self, optimizer: Any, *_: Any) -> None:
        # The optimizer may outlive PRe.
        if self._capture is not None:
            self.totals.gradient.measure(self.head, optimizer)


def find_handle(model: nn.Module) -> PreHandle | None:
    """The handle of `model` or of a module inside it, also in a deep copy; None without one."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            capture = getattr(hook, "__self__", None)
            if isinstance(capture, Capture):
                owner = getattr(capture.finish, "__self__", None)
                if isinstance(owner, PreHandle):
                    return owner
    return None
