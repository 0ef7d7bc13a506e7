"""Whether the optimizers of this process step the head and the model: torch's own hook tells,
without a host sync."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Steps:
    """What the optimizers that have stepped hold of a model and its head.

    It is looked up when a step begins: in a forward FSDP has other parameters in the place of those
    it splits.

    Attributes:
        count: of steps, of any optimizer.
        kinds: names of the optimizers that hold something of the model.
    """

    def __init__(self) -> None:
        self.count = 0
        self.kinds: set[str] = set()
        self._known: set[int] = set()
        self._missing: set[str] | None = None  # parameters of the head that none of them holds
        # whether one of them holds others of the model's parameters, or there are none to hold
        self._others = False
        self._news = False  # whether there is one since the last verdict

    def see(self, optimizer: Any, model: nn.Module, head: nn.Module) -> None:
        """A step of `optimizer` begins."""
        self.count += 1
        if id(optimizer) in self._known:
            return
        self._known.add(id(optimizer))
        held = {id(p) for p in parameters(optimizer)}
        of_head, others = split(model, head)
        if not held & (of_head.keys() | others):
            # It steps another model, or is an engine's that keeps copies of the parameters.
            return
        missing = {name for i, name in of_head.items() if i not in held}
        self._missing = missing if self._missing is None else self._missing & missing
        self._others |= not others or bool(others & held)
        self._news = True
        self.kinds.add(type(optimizer).__name__)

    def forget(self) -> None:
        """Look at each optimizer again when it steps next."""
        self._known.clear()
        self._missing = None
        self._others = False

    def verdict(self) -> str | None:
        """What all of them leave out, once for each that is new: "head", "model" (all but the
        head), or None."""
        if not self._news:
            return None
        self._news = False
        return "head" if self._missing else None if self._others else "model"


def split(model: nn.Module, head: nn.Module) -> tuple[dict[int, str], set[int]]:
    """Of the parameters that require grad: the ids and names of the head's, and the ids of the
    model's others."""
    of_head = {id(p): name for name, p in head.named_parameters() if p.requires_grad}
    return of_head, {id(p) for p in model.parameters() if p.requires_grad} - of_head.keys()


def parameters(optimizer: Any) -> Iterable[Any]:
    """All parameters of an optimizer's groups."""
    return (p for group in optimizer.param_groups for p in group["params"])


def unwrapped(optimizer: Any) -> Any:
    """The innermost of wrappers such as accelerate's and DeepSpeed's, which keep what they wrap as
    `.optimizer`."""
    while not (isinstance(optimizer, torch.optim.Optimizer) and "optimizer" not in vars(optimizer)):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    return optimizer


_live: weakref.WeakSet[Any] = weakref.WeakSet()
# one hook for all handles, and only as long as there is one to tell
_hook: RemovableHandle | None = None


def listen(handle: Any) -> None:
    """`handle.stepped(optimizer)` is called when an optimizer's step begins; a copy of it is told
    nothing."""
    global _hook
    _live.add(handle)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_stepped)


def ignore(handle: Any) -> None:
    """The end of `listen`. Not inside a step, where torch goes through its hooks."""
    global _hook
    _live.discard(handle)
    if not _live and _hook is not None:
        _hook.remove()
        _hook = None


def _stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
    for handle in list(_live):
        handle.stepped(optimizer)
