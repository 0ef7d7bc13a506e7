"""patch_trainer: `transformers.Trainer` averages L_PRe over the whole optimizer step, logs it, and
saves the head."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .agreement import agree_on_training
from .arguments import check_trainer_class
from .counting import counting_of
from .deferred import added_to_backward, replaced
from .distributed import check_no_context_parallelism
from .handle import PreHandle, find_handle
from .head_options import NO_GROUPS, add_head_groups, has_requested_settings
from .metrics import saw_tokens, to_log
from .notices import Notices
from .optimizers import parameters, unwrapped
from .resuming import model_loaded, optimizer_loaded, sharded

_MARK = "_pre_patch"


def patch_trainer(trainer_class: type | None = None) -> TrainerPatch:
    """Patch `trainer_class` until `remove()` of the returned patch; None patches
    `transformers.Trainer` and with it all subclasses.

    For trainers whose model has a handle (`apply_pre`, before or after this call):

    - L_PRe is averaged over all visual tokens of an optimizer step: its gradient is
      λ · ∇(Σℓ ÷ number of visual tokens) over all micro-batches and processes, however the trainer
      scales its own loss. It is added where the trainer calls `accelerator.backward`, so it also
      reaches trainers that ignore `output.loss`.
    - The head's parameters get optimizer groups of their own, after the others, with `head_lr` and
      `head_weight_decay`, also if a subclass makes the optimizer or leaves the head out. An
      optimizer that exists before `train()` stays as it is.
    - λ follows its schedule: `handle.progress` is the middle of each step in `max_steps`, so no
      step has λ 0.
    - Training logs get "pre_loss", "pre_cosine", "pre_tokens", "pre_skipped", "pre_head_grad_norm"
      and "pre_weight", if `handle.metrics()` has them, over all processes, since the last log.
    - Training logs get "task_loss": the logged "loss" less PRe's part of it, averaged as the
      trainer averages "loss". It is exact or absent: it is left out if `training_step` never calls
      `accelerator.backward` and returns something other than the loss that it back-propagates, and
      if "loss" is nan or inf.
    - `checkpoint-*` folders also hold the head, and resuming restores it. (DeepSpeed restores it
      from its own files.) The model is restored too where the Trainer would not, because its keys
      were renamed on saving. A checkpoint made without PRe can be resumed with PRe, and the
      reverse.

    If terms cannot be counted ahead (batches that are not mappings, inputs that are made later), or
    forwards have more terms than were counted, each micro-batch adds its own mean with equal
    weight, and a warning says so. Before transformers 4.46 nothing is counted: each forward with
    labels adds its own mean, as without this patch.

    While a trainer trains, its methods are wrapped on the instance, even if a subclass or another
    patch replaced them. Trainers whose model has no handle train as without the patch, and a
    warning says so.

    ```python
    with apply_pre(trainer.model), patch_trainer():
        trainer.train()
    ```

    If `trainer_class` or a base of it is patched already, this returns the patch that is there. It
    lasts until `remove()`, or until the last `with` block ends, if each call was in one.

    Raises:
        TypeError: if `trainer_class` is not a `transformers.Trainer`.
    """
    from transformers import Trainer

    target: Any = Trainer if trainer_class is None else trainer_class
    check_trainer_class(target, Trainer)
    patch: TrainerPatch = getattr(target, _MARK, None) or TrainerPatch(target)
    patch.calls += 1
    return patch


class TrainerPatch:
    """The methods that `patch_trainer` replaced; also a context manager."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.active = True
        self.calls = 0  # the calls of `patch_trainer` whose `with` block has not ended
        # Whether to warn of a training without a handle; the launcher has its own message.
        self.warns = True
        # For each name: the attribute of the class itself (None without one), and its replacement.
        self._replaced: dict[str, tuple[Any, Any]] = {}
        if not hasattr(target, "get_batch_samples"):
            warnings.warn(
                "PRe: this transformers (before 4.46) has no Trainer.get_batch_samples, so visual "
                "tokens are not counted over the step; its micro-batches weigh the same instead",
                stacklevel=3,
            )
        for name in _WRAPPERS:
            if hasattr(target, name):
                method = self._of_class(name, getattr(target, name))
                self._replaced[name] = vars(target).get(name), method
                setattr(target, name, method)
        setattr(target, _MARK, self)

    def remove(self) -> None:
        """Restore the class, except methods that somebody else has replaced since. Calling this
        twice is fine."""
        if not self.active:
            return
        # Somebody may have kept one of the methods; it calls the original only from here on.
        self.active = False
        for name, (before, method) in self._replaced.items():
            if vars(self.target).get(name) is not method:
                continue
            if before is None:
                delattr(self.target, name)
            else:
                setattr(self.target, name, before)
        if vars(self.target).get(_MARK) is self:
            delattr(self.target, _MARK)

    def __enter__(self) -> TrainerPatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.calls -= 1
        if self.calls <= 0:
            self.remove()

    def _of_class(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        # The Trainer reads signatures, which `wraps` keeps.
        @functools.wraps(original)
        def method(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            return self._call(name, functools.partial(original, trainer), trainer, *args, **kwargs)

        return method

    def _of_instance(self, name: str, trainer: Any) -> Callable[..., Any]:
        original = getattr(trainer, name)

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, original, trainer, *args, **kwargs)

        return method

    def _call(
        self, name: str, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the wrapper of `name` around `original`. Inside itself it calls `original` only, so
        that the outermost of the wrappers on class and instance counts."""
        if not self.active or trainer.model is None or name in vars(trainer).get("_pre_inside", ()):
            return original(*args, **kwargs)
        inside: set[str] = vars(trainer).setdefault("_pre_inside", set())
        inside.add(name)
        try:
            handle = find_handle(trainer.model)
            if name in _ENTRIES:
                with self._on(trainer):
                    return _WRAPPERS[name](handle, original, trainer, *args, **kwargs)
            if handle is None and name not in _WITHOUT_HANDLE:
                return original(*args, **kwargs)
            return _WRAPPERS[name](handle, original, trainer, *args, **kwargs)
        finally:
            inside.discard(name)
            if not inside:
                del trainer._pre_inside

    @contextlib.contextmanager
    def _on(self, trainer: Any) -> Iterator[None]:
        """Inside it all methods of this instance are wrapped, once."""
        if vars(trainer).get(_MARK) is not None:
            yield
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(trainer, _MARK, self))
            for name in _WRAPPERS:
                if hasattr(trainer, name) and name not in trainer._pre_inside:
                    stack.enter_context(replaced(trainer, name, self._of_instance(name, trainer)))
            yield


def _train(
    handle: PreHandle | None, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any
) -> Any:
    if handle is not None:
        handle.new_training()
    return original(*args, **kwargs)


def _inner_training_loop(
    handle: PreHandle | None, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any
) -> Any:
    if trainer.accelerator.num_processes > 1:
        agree_on_training(handle)
    if handle is None:
        if getattr(trainer, _MARK).warns:
            names = {"trainer": type(trainer).__name__, "model": type(trainer.model).__name__}
            Notices().warn("no handle", **names)
        return original(*args, **kwargs)
    check_no_context_parallelism()
    trainer._pre_counting = None
    inner = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    if handle.model not in (trainer.model, inner):
        names = {"inner": type(handle.model).__name__, "model": type(trainer.model).__name__}
        handle.notices.warn("handle inside", **names)
    handle.metrics()  # resets the sums of a training that ended by an error
    handle.advise(
        "patch_trainer() is in use, but its training_step is not: add output.loss, or call the "
        "Trainer's"
    )
    # DeepSpeed casts the whole model and keeps float32 copies.
    if not trainer.is_deepspeed_enabled:
        handle.restore_dtypes()
    with contextlib.ExitStack() as stack:
        # A subclass may have its own method, so the one of the instance is replaced.
        create = functools.partial(
            _create_optimizer, trainer.create_optimizer, handle, trainer, stack
        )
        stack.enter_context(replaced(trainer, "create_optimizer", create))
        try:
            return original(*args, **kwargs)
        finally:
            del trainer._pre_counting
            handle.advise(None)


def _create_optimizer(
    original: Callable[..., Any],
    handle: PreHandle,
    trainer: Any,
    stack: contextlib.ExitStack,
    *args: Any,
    **kwargs: Any,
) -> Any:
    was_there = trainer.optimizer is not None
    created = original(*args, **kwargs)
    optimizer: Any = unwrapped(trainer.optimizer)
    groups = handle.param_groups()
    name = type(optimizer).__name__
    why = NO_GROUPS.get(name)
    if not isinstance(optimizer, torch.optim.Optimizer):
        name = "the optimizer of a DeepSpeed config"
        why = 'which makes its own groups; leave "optimizer" out of it'
    if why is not None:
        if handle.own_rates:
            handle.notices.warn("optimizer of its own", optimizer=name, why=why)
        return created
    if not was_there:
        for group, error in add_head_groups(optimizer, groups):
            refused = {id(p) for p in group["params"]}
            names = ", ".join(n for n, p in handle.head.named_parameters() if id(p) in refused)
            handle.notices.warn("optimizer refuses", optimizer=name, names=names, error=error)
    elif not {id(p) for group in groups for p in group["params"]} <= {
        id(p) for p in parameters(optimizer)
    }:
        handle.notices.warn("optimizer given")
        handle.notices.settle("optimizer without the head")
    elif not has_requested_settings(groups, optimizer):
        handle.notices.warn("optimizer made before")
    stack.callback(handle.watch(optimizer).remove)
    return created


def _get_batch_samples(
    handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any
) -> Any:
    samples, items = original(*args, **kwargs)
    handle.progress = min((trainer.state.global_step + 0.5) / max(trainer.state.max_steps, 1), 1.0)
    counting = counting_of(trainer, handle)
    if handle.enabled and handle.scheduled_weight:
        counting.begin(samples)
    else:  # A callback may turn PRe on before the first micro-batch.
        counting.wait(samples)
    return samples, items


def _training_step(
    handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any
) -> Tensor | Any:
    counting = counting_of(trainer, handle)
    counts_ahead = hasattr(trainer, "get_batch_samples")  # since transformers 4.46
    wanted = handle.enabled and handle.scheduled_weight
    if not wanted:
        counting.skip()
        loss = original(*args, **kwargs)
        counting.returned(loss, 0.0)
        return loss
    if not (counting.deferring and counts_ahead):
        return original(*args, **kwargs)
    step = counting.micro_batch()
    count = step.counts.pop(0) if step.counts else None
    divisor = None if count is None or step.total is None else step.divisor
    # Other processes may have counted their terms, so the group is not asked for the divisor.
    ungrouped = counting.ahead and count is None
    with (
        handle.defer(divisor, step.size, count, ungrouped, counting.alone) as deferred,
        added_to_backward(trainer.accelerator, deferred),
    ):
        loss = original(*args, **kwargs)
    counting.saw(deferred, uncounted=ungrouped)
    counting.reached |= torch.is_tensor(deferred.added)
    # If losses reached accelerator.backward before, the trainer left this one out on purpose, for
    # instance because it is nan.
    if deferred.losses and not counting.reached:
        handle.notices.warn("no accelerator.backward", trainer=type(trainer).__name__)
        counting.deferring = False
    added = deferred.added
    total = loss + (added.to(loss.device) if torch.is_tensor(added) else added)
    counting.returned(total, added)
    return total


def _log(
    handle: PreHandle,
    original: Callable[..., Any],
    trainer: Any,
    logs: dict[str, float],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if "loss" in logs:  # This is a training log, which every process writes at the same step.
        counting = counting_of(trainer, handle)
        metrics = handle.metrics(combine=counting.combined())
        # The mean over forwards is not the trainer's, which may weigh them.
        metrics.pop("task_loss", None)
        task = counting.task_loss(logs["loss"])
        if task is not None:
            logs["task_loss"] = task
        if saw_tokens(metrics):
            logs |= to_log(metrics)
    return original(logs, *args, **kwargs)


def _save(
    handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any
) -> Any:
    done = original(*args, **kwargs)
    if not sharded(trainer):
        folder = (args[0] if args else kwargs.get("output_dir")) or trainer.args.output_dir
        handle.save(folder, writes=trainer.args.should_save)
    return done


def _save_model(
    handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any
) -> Any:
    done = original(*args, **kwargs)
    # Saving a sharded model is collective, and not every process reaches `_save`.
    if sharded(trainer):
        folder = (args[0] if args else kwargs.get("output_dir")) or trainer.args.output_dir
        handle.save(folder, trainer.model_wrapped, writes=trainer.args.should_save)
    return done


def _load_from_checkpoint(
    handle: PreHandle,
    original: Callable[..., Any],
    trainer: Any,
    folder: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    with model_loaded(handle, trainer, folder):
        return original(folder, *args, **kwargs)


def _load_best_model(handle: PreHandle, original: Callable[..., Any], trainer: Any) -> Any:
    with model_loaded(handle, trainer, trainer.state.best_model_checkpoint):
        return original()


def _load_optimizer_and_scheduler(
    handle: PreHandle | None, original: Callable[..., Any], trainer: Any, folder: str | None
) -> Any:
    with optimizer_loaded(handle, trainer, folder):
        return original(folder)


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "train": _train,
    "_inner_training_loop": _inner_training_loop,
    "get_batch_samples": _get_batch_samples,
    "training_step": _training_step,
    "log": _log,
    "_save": _save,
    "save_model": _save_model,
    "_load_from_checkpoint": _load_from_checkpoint,
    "_load_best_model": _load_best_model,
    "_load_optimizer_and_scheduler": _load_optimizer_and_scheduler,
}
_ENTRIES = ("train", "_inner_training_loop")
_WITHOUT_HANDLE = (*_ENTRIES, "_load_optimizer_and_scheduler")
