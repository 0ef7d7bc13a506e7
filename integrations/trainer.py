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

from . import checkpoint
from .handle import ATTRIBUTE, Deferred, PreHandle, find_handle
from .training import as_asked, own_groups

_MARK = "_pre_patch"


def patch_trainer(trainer_class: type | None = None) -> TrainerPatch:
    """A patch on `trainer_class` (`transformers.Trainer` and with it all subclasses if None), until its `remove()`.

    For trainers whose model has a handle (`apply_pre`, before or after this call):

    - the auxiliary gradient of an optimizer step is λ · ∇(Σℓ over the step's visual tokens ÷ their number, over all
      micro-batches and processes), whatever the accumulation, the image counts and the rule for the loss's scale. It is
      added where the trainer calls `accelerator.backward`, so it also reaches trainers that ignore `output.loss`;
    - the head's parameters are in optimizer groups of their own, last, with `head_lr` and `head_weight_decay`, also
      where a subclass makes the optimizer or leaves the head out; one that is there before `train()` stays as it is;
    - λ follows its schedule: a step's `handle.progress` is its middle in the `max_steps`, so no step has λ 0;
    - training logs get "pre_loss", "pre_cosine", "pre_tokens", "pre_skipped", "pre_head_grad_norm" and "pre_weight",
      each where `handle.metrics()` has it, over all processes, since the last log;
    - `checkpoint-*` folders also hold the head, and resuming restores it (DeepSpeed does from its own), and the model
      too where the Trainer would not, because its keys were renamed on saving.

    Other trainers of the class behave as before. Before transformers 4.46, and where batches are no mappings, nothing
    is counted ahead: each forward with labels adds its own mean, as without this patch.

    ```python
    with apply_pre(trainer.model), patch_trainer():
        trainer.train()
    ```

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


def _inner_training_loop(
    handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any
) -> Any:
    handle.metrics()  # what a training that ran out of memory has left
    trainer._pre_divisor = None
    with contextlib.ExitStack() as stack:
        create = functools.partial(_create_optimizer, trainer.create_optimizer, handle, trainer, stack)
        stack.enter_context(_replaced(trainer, "create_optimizer", create))  # a subclass may have its own
        try:
            return original(*args, **kwargs)
        finally:
            trainer._pre_divisor = None


def _create_optimizer(
    original: Callable[..., Any],
    handle: PreHandle,
    trainer: Any,
    stack: contextlib.ExitStack,
    *args: Any,
    **kwargs: Any,
) -> Any:
    given = trainer.optimizer is not None
    found = original(*args, **kwargs)
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's has the real one
    groups = handle.param_groups()
    if not isinstance(optimizer, torch.optim.Optimizer):  # DeepSpeed makes it from its own config
        if any("lr" in group for group in groups) or "weight_decay" in groups[0]:
            warnings.warn(
                "PRe: head_lr and head_weight_decay do nothing with the optimizer of a DeepSpeed config; leave "
                '"optimizer" out of it',
                stacklevel=2,
            )
        return found
    if not given:
        own_groups(optimizer, groups)
    elif not _all_in(groups, optimizer):
        warnings.warn(
            "PRe: the optimizer given to the Trainer lacks parameters of the head, so they are not trained; make it "
            "after apply_pre, with handle.param_groups()",
            stacklevel=2,
        )
    elif not as_asked(groups, optimizer):
        warnings.warn(
            "PRe: the optimizer was made before the training, without head_lr and head_weight_decay, which do nothing "
            "in it; let train() make it, or give the Trainer one with handle.param_groups()",
            stacklevel=2,
        )
    stack.callback(handle.watch(optimizer).remove)
    return found


def _all_in(groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> bool:
    there = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(p) in there for group in groups for p in group["params"])


def _get_batch_samples(handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    samples, items = original(*args, **kwargs)
    trainer._pre_divisor = None
    handle.progress = min((trainer.state.global_step + 0.5) / max(trainer.state.max_steps, 1), 1.0)
    if not handle.enabled or not handle.scheduled_weight:
        return samples, items
    other = next((type(batch).__name__ for batch in samples if not hasattr(batch, "keys")), None)
    if other is not None:  # the trainer makes the model's inputs of it later
        if not getattr(trainer, "_pre_told", False):
            trainer._pre_told = True
            warnings.warn(
                f"PRe: the batches of {type(trainer).__name__} are no mappings ({other}), so visual tokens are not "
                "counted over the step; each forward with labels adds its own mean to output.loss instead",
                stacklevel=2,
            )
        return samples, items
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
    added = deferred.added
    return loss + (added.to(loss.device) if torch.is_tensor(added) else added)


def _added_to_backward(accelerator: Any, deferred: Deferred) -> contextlib.AbstractContextManager[None]:
    backward = accelerator.backward

    def with_terms(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        for term in deferred.take():
            loss = loss + term.to(loss.device)
        return backward(loss, *args, **kwargs)

    return _replaced(accelerator, "backward", with_terms)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """`method` in place of that of this instance, which may have one of its own."""
    own = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


def _log(
    handle: PreHandle, original: Callable[..., Any], trainer: Any, logs: dict[str, float], *args: Any, **kwargs: Any
) -> Any:
    if "loss" in logs:  # a training log, which every process writes at the same step
        found = handle.metrics(combine=functools.partial(_over_processes, trainer))
        if found["pre_rows"] or found.get("pre_skipped"):
            logs |= {name: value for name, value in found.items() if name not in ("pre_rows", "pre_forwards")}
    return original(logs, *args, **kwargs)


def _save(handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    done = original(*args, **kwargs)
    if not sharded(trainer):
        folder = (args[0] if args else kwargs.get("output_dir")) or trainer.args.output_dir
        checkpoint.save(handle, folder, writes=trainer.args.should_save)
    return done


def _save_model(handle: PreHandle, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    done = original(*args, **kwargs)
    if sharded(trainer):  # collective; every process comes here, not every one to `_save`
        folder = (args[0] if args else kwargs.get("output_dir")) or trainer.args.output_dir
        checkpoint.save(handle, folder, trainer.model_wrapped, trainer.args.should_save)
    return done


def _load_from_checkpoint(
    handle: PreHandle, original: Callable[..., Any], trainer: Any, folder: str, *args: Any, **kwargs: Any
) -> Any:
    with _names_given(trainer.model) as saved:
        done = original(folder, *args, **kwargs)
    _load_renamed(trainer, folder, saved)
    _restore(handle, trainer, folder)
    return done


def _load_best_model(handle: PreHandle, original: Callable[..., Any], trainer: Any) -> Any:
    with _names_given(trainer.model) as saved:
        done = original()
    _load_renamed(trainer, trainer.state.best_model_checkpoint, saved)
    _restore(handle, trainer, trainer.state.best_model_checkpoint)
    return done


@contextlib.contextmanager
def _names_given(model: Any) -> Iterator[set[str]]:
    """The names of the tensors that `model` is given to load, known at the end, whatever the files they are in."""
    names: set[str] = set()
    hook = model.register_load_state_dict_pre_hook(lambda module, state, *_: names.update(state))
    try:
        yield names
    finally:
        hook.remove()


def _load_renamed(trainer: Any, folder: str, saved: set[str]) -> None:
    """Load what the Trainer left out: `save_pretrained` renames keys in many families, and the Trainer ignores those.

    It loads with strict=False, so such a model would go on from the weights it was made with. What the checkpoint does
    not hold stays as it is.
    """
    model = trainer.model
    if sharded(trainer) or not hasattr(type(model), "from_pretrained") or hasattr(model, "peft_config"):
        return
    own = model.state_dict().keys()
    if saved <= own:
        return
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in os.listdir(folder)):
        if all(ATTRIBUTE in name.split(".") for name in own - saved):  # what is left over was a buffer once
            return
        raise RuntimeError(
            f"PRe: {folder} has no model.safetensors but weights under names that changed on saving, such as "
            f"{min(saved - own)!r}, which the Trainer leaves out; want {type(model).__name__}.from_pretrained(folder)"
            ".save_pretrained(folder) before resuming, and save_safetensors=True in training"
        )
    wide = torch.promote_types(model.dtype, torch.float32)
    loaded, info = type(model).from_pretrained(folder, dtype=wide, use_safetensors=True, output_loading_info=True)
    absent = set(info["missing_keys"])  # from_pretrained made them up
    found = {name: tensor for name, tensor in loaded.state_dict().items() if name not in absent}
    result = model.load_state_dict(found, strict=False)
    # the Trainer has loaded modules that the user added, under their own names
    lost = (set(info["unexpected_keys"]) - (saved & own)) | set(result.unexpected_keys)
    if lost:
        raise RuntimeError(f"PRe: {folder} holds tensors that were not loaded into this model: {sorted(lost)}")


def _restore(handle: PreHandle, trainer: Any, folder: str) -> None:
    try:
        handle.load(folder, trainer.model_wrapped)
    except FileNotFoundError as error:  # on every process alike
        warnings.warn(f"PRe: {folder} holds no head, so it starts from its initial weights ({error})", stacklevel=2)


def sharded(trainer: Any) -> bool:
    """Whether its model's parameters are split over processes, or may be."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _over_processes(trainer: Any, value: Tensor) -> Tensor:
    if trainer.accelerator.num_processes == 1:
        return value
    return trainer.accelerator.reduce(value.to(trainer.accelerator.device), reduction="sum")


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "_inner_training_loop": _inner_training_loop,
    "get_batch_samples": _get_batch_samples,
    "training_step": _training_step,
    "log": _log,
    "_save": _save,
    "save_model": _save_model,
    "_load_from_checkpoint": _load_from_checkpoint,
    "_load_best_model": _load_best_model,
}
