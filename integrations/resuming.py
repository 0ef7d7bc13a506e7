"""What a `transformers.Trainer` gets from a checkpoint: the head, and the optimizer's state with or
without it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from .handle import PreHandle
from .head_options import MARK
from .notices import Notices
from .optimizers import unwrapped
from .workarounds import load_renamed, names_given

# lists in a scheduler's state that have an entry for each group of the optimizer
OF_GROUPS = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs")


def sharded(trainer: Any) -> bool:
    """Whether its model's parameters are split over processes, or may be."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


@contextlib.contextmanager
def model_loaded(handle: PreHandle, trainer: Any, folder: str) -> Iterator[None]:
    """Around the Trainer's own loading: the head and what it leaves out come after it, and one line
    says so."""
    # FSDP and DeepSpeed look for all parameters in their checkpoints, which have the head's too.
    hidden = contextlib.nullcontext() if sharded(trainer) else handle.excluded()
    with names_given(trainer.model) as names, hidden:
        yield
    if not sharded(trainer):
        load_renamed(trainer.model, folder, names)
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
def optimizer_loaded(handle: PreHandle | None, trainer: Any, folder: Any) -> Iterator[None]:
    """Around the Trainer's own loading: states of a training with the head for one without it, and
    the reverse.

    The head's groups are the optimizer's last, so those of the rest are the same with and without
    it.
    """
    optimizer = unwrapped(trainer.optimizer)
    scheduler = trainer.lr_scheduler
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
    saved = [bool(group.get(MARK)) for group in state["param_groups"]]
    here = [bool(group.get(MARK)) for group in now["param_groups"]]
    if saved.count(False) != here.count(False) or any(saved) == any(here):
        return None  # whether the other groups fit is torch's to judge
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
