"""patch_trainer: `transformers.Trainer` weighs L_PRe over the whole optimizer step, logs it, keeps the head."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .checkpoint import WEIGHTS
from .handle import Deferred, PreHandle, find_handle

_MARK = "_pre_patch"


def patch_trainer(trainer_class: type | None = None) -> TrainerPatch:
    """A patch on `trainer_class` (`transformers.Trainer` and with it all subclasses if None), until its `remove()`.

    For trainers whose model has a handle (`apply_pre`, before or after this call):

    - the auxiliary gradient of an optimizer step is λ · ∇(Σℓ over the step's visual tokens ÷ their number, over all
      micro-batches and processes), whatever the accumulation, the image counts and the rule for the loss's scale. It is
      added where the trainer calls `accelerator.backward`, so it also reaches trainers that ignore `output.loss`;
    - training logs get "pre_loss";
    - `checkpoint-*` folders also hold the head, and resuming restores it (FSDP and DeepSpeed keep it in their own).

    Other trainers of the class behave as before. Before transformers 4.46 the micro-batches of a step weigh the same.

    Raises:
        TypeError: if `trainer_class` is not a `transformers.Trainer`.
        RuntimeError: if it (or a base of it) is patched already.
    """
    from transformers import Trainer

    target: Any = Trainer if trainer_class is None else trainer_class
    if not (isinstance(target, type) and issubclass(target, Trainer)):
        raise TypeError(f"trainer_class: got {target!r}, want transformers.Trainer or a subclass")
    if getattr(target, _MARK, None) is not None:
        raise RuntimeError(f"trainer_class: {target.__name__} is patched already; call remove() of that patch first")
    return TrainerPatch(target)


class TrainerPatch:
    """The methods that `patch_trainer` replaced; also a context manager."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self._before: dict[str, Any] = {_MARK: None}
        wrappers = {name: wrapper for name, wrapper in _WRAPPERS.items() if hasattr(target, name)}
        if "get_batch_samples" not in wrappers:
            warnings.warn(
                "PRe: this transformers (before 4.46) has no Trainer.get_batch_samples, so visual tokens are not "
                "counted over the step; its micro-batches weigh the same instead",
                stacklevel=3,
            )
        for name, wrapper in wrappers.items():
            original = getattr(target, name)
            self._before[name] = vars(target).get(name)
            setattr(target, name, _wrap(original, wrapper))
        setattr(target, _MARK, self)

    def remove(self) -> None:
        """Put the class back as it was. Calling it twice is fine."""
        for name, original in self._before.items():
            if original is not None:
                setattr(self.target, name, original)
            elif name in vars(self.target):
                delattr(self.target, name)
        self._before.clear()

    def __enter__(self) -> TrainerPatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _wrap(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)  # the Trainer reads signatures
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = find_handle(self.model)
        if handle is None:
            return original(self, *args, **kwargs)
        return wrapper(handle, functools.partial(original, self), self, *args, **kwargs)

    return method


def _get_batch_samples(handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    samples, items = original(*args, **kwargs)
    trainer._pre_divisor = None
    if handle.enabled and handle.weight:
        device = trainer.args.device
        count = torch.zeros((), dtype=torch.long, device=device)
        for batch in samples:
            count += handle.count(dict(batch)).to(device)
        # the processes' gradients are averaged, so each divides by its part of the global count
        processes = trainer.accelerator.num_processes
        trainer._pre_divisor = _over_processes(trainer, count).clamp(min=1).float() / processes
    return samples, items


def _training_step(
    handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any
) -> Tensor | Any:
    divisor = getattr(trainer, "_pre_divisor", None)
    if divisor is None:
        return original(*args, **kwargs)
    with handle.defer(divisor) as deferred, _added_to_backward(trainer.accelerator, deferred):
        loss = original(*args, **kwargs)
    if deferred.terms:
        raise RuntimeError(
            f"PRe: L_PRe was computed but {type(trainer).__name__}.training_step never called accelerator.backward, so "
            "it would not be trained; remove patch_trainer() and add output.loss to your loss"
        )
    return loss + deferred.added


@contextlib.contextmanager
def _added_to_backward(accelerator: Any, deferred: Deferred) -> Iterator[None]:
    backward, own = accelerator.backward, vars(accelerator).get("backward")

    def with_terms(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        for term in deferred.take():
            loss = loss + term.to(loss.device)
        return backward(loss, *args, **kwargs)

    accelerator.backward = with_terms
    try:
        yield
    finally:
        del accelerator.backward
        if own is not None:
            accelerator.backward = own


def _log(
    handle: PreHandle, original: Callable[..., Any], trainer: Any, logs: dict[str, float], *args: Any, **kwargs: Any
) -> Any:
    if "loss" in logs:  # a training log, which every process writes at the same step
        found = handle.metrics(combine=functools.partial(_over_processes, trainer))
        if found["pre_rows"]:
            logs |= {name: value for name, value in found.items() if name.startswith("pre_loss")}
    return original(logs, *args, **kwargs)


def _save(handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    done = original(*args, **kwargs)
    if not _sharded(trainer):
        handle.save((args[0] if args else kwargs.get("output_dir")) or trainer.args.output_dir)
    return done


def _load_from_checkpoint(
    handle: PreHandle, original: Callable[..., Any], trainer: Any, folder: str, *args: Any, **kwargs: Any
) -> Any:
    done = original(folder, *args, **kwargs)
    _restore(handle, trainer, folder)
    return done


def _load_best_model(handle: PreHandle, original: Callable[..., Any], trainer: Any) -> Any:
    done = original()
    _restore(handle, trainer, trainer.state.best_model_checkpoint)
    return done


def _restore(handle: PreHandle, trainer: Any, folder: str) -> None:
    if _sharded(trainer):
        return
    if os.path.exists(os.path.join(folder, WEIGHTS)):
        handle.load(folder)
    else:
        warnings.warn(f"PRe: {folder} holds no head, so it starts from its initial weights", stacklevel=2)


def _sharded(trainer: Any) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _over_processes(trainer: Any, value: Tensor) -> Tensor:
    if trainer.accelerator.num_processes == 1:
        return value
    return trainer.accelerator.reduce(value.to(trainer.accelerator.device), reduction="sum")


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "get_batch_samples": _get_batch_samples,
    "training_step": _training_step,
    "log": _log,
    "_save": _save,
    "_load_from_checkpoint": _load_from_checkpoint,
    "_load_best_model": _load_best_model,
}
