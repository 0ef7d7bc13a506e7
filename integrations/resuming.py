"""Resume a `transformers.Trainer` from a checkpoint: load the head, and fit the optimizer's state
to a training with or without it."""

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

# These lists in a scheduler's state have one entry for each group of the optimizer.
OF_GROUPS = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs")
# These entries of an optimizer's state have the shape of their parameter.
MOMENTS = ("exp_avg", "momentum_buffer")


def sharded(trainer: Any) -> bool:
    """Whether the parameters of the trainer's model are or may be split over processes."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


@contextlib.contextmanager
def model_loaded(handle: PreHandle, trainer: Any, folder: str) -> Iterator[None]:
    """Wrap the Trainer's own loading of the model: afterwards load the head and the weights that
    the Trainer left out, and print one line about it."""
    # Under FSDP and DeepSpeed nothing is excluded: their checkpoints contain all parameters,
    # including the head's, and loading looks for all of them.
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
    """Wrap the Trainer's own loading of the optimizer: a training without the head can load the
    state of one with it, and the reverse.

    The groups of the head are the optimizer's last ones, so the others are the same in both.
    """
    optimizer = unwrapped(trainer.optimizer)
    scheduler = trainer.lr_scheduler
    if folder is None or not isinstance(optimizer, torch.optim.Optimizer):
        yield
        return
    notices = Notices() if handle is None else handle.notices

    def of_groups(_: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        taken_out = None if handle is None else _taken_out(state, optimizer, handle, folder)
        return taken_out or _fitted(state, optimizer.state_dict(), notices, folder)

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


def _taken_out(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, handle: PreHandle, folder: str
) -> dict[str, Any] | None:
    """A saved optimizer `state` that has the head in the groups of the model, changed to have
    groups of the head. None if it is not such a state.

    pre-kernels 0.1.0 and `PreCallback` leave the head in the groups of the model. As it is the last
    module, its parameters are the last of a group.

    Raises:
        ValueError: if the groups have more parameters than the model, which are not the head's.
    """
    saved = state["param_groups"]
    others = [group for group in optimizer.param_groups if not group.get(MARK)]
    own = [group for group in optimizer.param_groups if group.get(MARK)]
    if not own or len(saved) != len(others) or any(group.get(MARK) for group in saved):
        return None
    lengths = [len(group["params"]) for group in others]
    tails = [group["params"][n:] for group, n in zip(saved, lengths, strict=True)]
    if not any(tails):
        return None
    numbers = _matched(tails, own, handle, state["state"])
    if numbers is None:
        raise ValueError(
            f"optimizer: got groups of {[len(group['params']) for group in saved]} parameters in "
            f"{folder}, want {lengths} and the head's {[len(group['params']) for group in own]}; "
            "train what that training did, with the same head, or move optimizer.pt and "
            "scheduler.pt out of the folder to resume without its state"
        )
    groups = [
        group | {"params": group["params"][:n]} for group, n in zip(saved, lengths, strict=True)
    ]
    source = next(group for group, tail in zip(saved, tails, strict=True) if tail)
    for group in own:
        settings = {key: value for key, value in group.items() if key != "params"}
        if group.get("initial_lr") == source.get("initial_lr"):
            settings["lr"] = source["lr"]
        groups.append(settings | {"params": [numbers[id(p)] for p in group["params"]]})
    return state | {"param_groups": groups}


def _matched(
    tails: list[list[int]], own: list[dict[str, Any]], handle: PreHandle, states: dict[int, Any]
) -> dict[int, int] | None:
    """The number in a saved optimizer of each parameter of the head, by its id. `tails` are the
    numbers in each saved group that may be the head's. None if they are not."""
    order = [p for group in own for p in group["params"]]
    if sum(map(bool, tails)) == 1:
        # A group has its parameters in the order of the module.
        places = {id(p): place for place, p in enumerate(handle.head.parameters())}
        order.sort(key=lambda p: places[id(p)])
    elif [*map(len, tails)] != [len(group["params"]) for group in own]:
        return None
    flat = [number for tail in tails for number in tail]
    if len(flat) != len(order):
        return None
    for parameter, number in zip(order, flat, strict=True):
        entry = states.get(number, {})
        moments = [entry[name] for name in MOMENTS if torch.is_tensor(entry.get(name))]
        if any(moment.shape != parameter.shape for moment in moments):
            return None
    return dict(zip(map(id, order), flat, strict=True))


def _fitted(
    state: dict[str, Any], now: dict[str, Any], notices: Notices, folder: str
) -> dict[str, Any] | None:
    """A saved optimizer `state`, changed to have the same groups of the head as the state `now`.
    None if nothing has to change."""
    saved = [bool(group.get(MARK)) for group in state["param_groups"]]
    here = [bool(group.get(MARK)) for group in now["param_groups"]]
    if saved.count(False) != here.count(False) or any(saved) == any(here):
        return None  # torch checks the other groups
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
