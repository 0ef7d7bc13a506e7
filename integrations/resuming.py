"""What a `transformers.Trainer` gets from a checkpoint: the head, weights with renamed keys, the
optimizer's state."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from .handle import ATTRIBUTE, PreHandle
from .head_options import MARK
from .notices import Notices
from .optimizers import unwrapped

OF_GROUPS = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
)  # of a scheduler's state: an entry for each group


def sharded(trainer: Any) -> bool:
    """Whether its model's parameters are split over processes, or may be."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


@contextlib.contextmanager
def model_loaded(handle: PreHandle, trainer: Any, folder: str) -> Iterator[None]:
    """Around the Trainer's own loading: the head and what it leaves out come after it, and one line
    says so."""
    # what splits parameters looks for all of them in its checkpoint, where the head is too
    hidden = contextlib.nullcontext() if sharded(trainer) else handle.excluded()
    with _names_given(trainer.model) as saved, hidden:
        yield
    _load_renamed(trainer, folder, saved)
    try:
        handle.load(folder, trainer.model_wrapped)
    except FileNotFoundError as error:  # on every process alike
        handle.notices.warn("no head in the checkpoint", folder=folder, error=error)
        return
    if trainer.is_world_process_zero():
        print(
            f"PRe: the model's weights and the head are those of {folder}",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def _names_given(model: Any) -> Iterator[set[str]]:
    """The names of the tensors that `model` is given to load, known at the end, whatever the files
    they are in."""
    names: set[str] = set()

    def nothing_missing(module: Any, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if ATTRIBUTE not in key.split(".")]

    hooks = [
        model.register_load_state_dict_pre_hook(lambda module, state, *_: names.update(state)),
        model.register_load_state_dict_post_hook(nothing_missing),  # the head has a file of its own
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def _load_renamed(trainer: Any, folder: str, saved: set[str]) -> None:
    """Load what the Trainer left out: `save_pretrained` renames keys in many families, and the
    Trainer ignores those.

    It loads with strict=False, so such a model would go on from the weights it was made with. What
    the checkpoint does not hold stays as it is.
    """
    model = trainer.model
    if (
        sharded(trainer)
        or not hasattr(type(model), "from_pretrained")
        or hasattr(model, "peft_config")
    ):
        return
    own = model.state_dict().keys()
    if saved <= own:
        return
    if not any(
        name.startswith("model") and name.endswith(".safetensors") for name in os.listdir(folder)
    ):
        if all(
            ATTRIBUTE in name.split(".") for name in own - saved
        ):  # what is left over was a buffer once
            return
        raise RuntimeError(
            f"PRe: {folder} has no model.safetensors but weights under names that changed on saving, such as "
            f"{min(saved - own)!r}, which the Trainer leaves out; want {type(model).__name__}.from_pretrained(folder)"
            ".save_pretrained(folder) before resuming, and save_safetensors=True in training"
        )
    wide = torch.promote_types(model.dtype, torch.float32)
    loaded, info = type(model).from_pretrained(
        folder, dtype=wide, use_safetensors=True, output_loading_info=True
    )
    absent = set(info["missing_keys"])  # from_pretrained made them up
    found = {name: tensor for name, tensor in loaded.state_dict().items() if name not in absent}
    result = model.load_state_dict(found, strict=False)
    # the Trainer has loaded modules that the user added, under their own names
    lost = (set(info["unexpected_keys"]) - (saved & own)) | set(result.unexpected_keys)
    if lost:
        raise RuntimeError(
            f"PRe: {folder} holds tensors that were not loaded into this model: {sorted(lost)}"
        )


@contextlib.contextmanager
def optimizer_loaded(handle: PreHandle | None, trainer: Any, folder: Any) -> Iterator[None]:
    """Around the Trainer's own loading: states of a training with the head for one without it, and
    the reverse.

    The head's groups are the optimizer's last, so those of the rest are the same with and without
    it.
    """
    optimizer, scheduler = unwrapped(trainer.optimizer), trainer.lr_scheduler
    if folder is None or not isinstance(optimizer, torch.optim.Optimizer):
        yield
        return
    notices = Notices() if handle is None else handle.notices

    def of_groups(_: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        return _fitted(state, optimizer.state_dict(), notices, folder)

    def of_scheduler(state: dict[str, Any]) -> Any:
        assert load is not None
        now = scheduler.state_dict()
        for name in OF_GROUPS:
            if isinstance(state.get(name), list) and isinstance(now.get(name), list):
                state[name] = state[name][: len(now[name])] + now[name][len(state[name]) :]
        return load(state)

    hook = optimizer.register_load_state_dict_pre_hook(of_groups)
    load = getattr(scheduler, "load_state_dict", None)
    if load is not None:
        scheduler.load_state_dict = of_scheduler
    try:
        yield
    finally:
        hook.remove()
        if load is not None:
            del scheduler.load_state_dict


def _fitted(
    state: dict[str, Any], now: dict[str, Any], notices: Notices, folder: str
) -> dict[str, Any] | None:
    """An optimizer's `state` with as many groups of the head as it has `now`; None if they
    agree."""
    saved, here = ([bool(group.get(MARK)) for group in s["param_groups"]] for s in (state, now))
    if saved.count(False) != here.count(False) or any(saved) == any(here):
        return None  # others' groups are torch's to judge
    groups = [group for group in state["param_groups"] if not group.get(MARK)]
    own = {i for group in state["param_groups"] if group.get(MARK) for i in group["params"]}
    first = 1 + max((i for group in groups for i in group["params"]), default=-1)
    for group in now["param_groups"]:
        if group.get(MARK):
            groups.append(group | {"params": list(range(first, first + len(group["params"])))})
            first += len(group["params"])
    notices.warn(
        "optimizer without the head's state" if any(here) else "head's state left out",
        folder=folder,
    )
    return state | {
        "state": {i: s for i, s in state["state"].items() if i not in own},
        "param_groups": groups,
    }
