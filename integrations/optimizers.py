"""Check whether the optimizers of this process step the head and the model. A hook of torch reports
the steps, without waiting for the device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Steps:
    """Which parameters of a model and its head the optimizers that have stepped hold.

    This is looked up when a step begins, because during a forward FSDP has other parameters in
    place of those it splits.

    Attributes:
        count: the number of steps of all optimizers.
        kinds: the class names of the optimizers that hold parameters of the model.
        calls: the number of calls of the model.
        uncalled: how often in a row such an optimizer stepped again without a call between.
    """

    def __init__(self) -> None:
        self.count = 0
        self.kinds: set[str] = set()
        self.calls = 0
        self.uncalled = 0
        # The `calls` at the last step of each optimizer, by id; -1 if it holds no such parameters.
        self._known: dict[int, int] = {}
        # Names of the head's parameters that none of the optimizers holds.
        self._missing: set[str] | None = None
        # Whether one of them holds parameters outside the head, or the model has no others.
        self._others = False
        self._news = False  # whether a new optimizer was seen since the last verdict

    def see(self, optimizer: Any, model: nn.Module, head: nn.Module) -> None:
        """Record that a step of `optimizer` begins."""
        self.count += 1
        last = self._known.get(id(optimizer))
        if last is not None:
            if last >= 0:
                self.uncalled = self.uncalled + 1 if last == self.calls else 0
                self._known[id(optimizer)] = self.calls
            return
        held = {id(p) for p in parameters(optimizer)}
        of_head, others = split(model, head)
        if not held & (of_head.keys() | others):
            # It steps another model, or belongs to an engine that keeps copies of the parameters.
            self._known[id(optimizer)] = -1
            return
        self._known[id(optimizer)] = self.calls
        missing = {name for i, name in of_head.items() if i not in held}
        self._missing = missing if self._missing is None else self._missing & missing
        self._others |= not others or bool(others & held)
        self._news = True
        self.kinds.add(type(optimizer).__name__)

    def forget(self) -> None:
        """Look at each optimizer again at its next step."""
        self._known.clear()
        self._missing = None
        self._others = False

    def verdict(self) -> str | None:
        """What all optimizers together leave out: "head", "model" (everything but the head), or
        None. None again until another optimizer is seen."""
        if not self._news:
            return None
        self._news = False
        return "head" if self._missing else None if self._others else "model"


def split(model: nn.Module, head: nn.Module) -> tuple[dict[int, str], set[int]]:
    """The parameters that require grad: the ids and names of those of the head, and the ids of the
    others of the model."""
    of_head = {id(p): name for name, p in head.named_parameters() if p.requires_grad}
    return of_head, {id(p) for p in model.parameters() if p.requires_grad} - of_head.keys()


def parameters(optimizer: Any) -> Iterable[Any]:
    """All parameters of an optimizer's groups."""
    return (p for group in optimizer.param_groups for p in group["params"])


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside wrappers such as accelerate's and DeepSpeed's, which keep it as
    `.optimizer`."""
    while not (isinstance(optimizer, torch.optim.Optimizer) and "optimizer" not in vars(optimizer)):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    return optimizer


_live: weakref.WeakSet[Any] = weakref.WeakSet()
# One hook serves all handles. It is removed when no handle listens any more.
_hook: RemovableHandle | None = None


def listen(handle: Any) -> None:
    """Call `handle.stepped(optimizer)` when the step of any optimizer begins. Copies of `handle`
    are not called."""
    global _hook
    _live.add(handle)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_stepped)


def ignore(handle: Any) -> None:
    """End `listen`. Do not call this inside a step, while torch iterates over its hooks."""
    global _hook
    _live.discard(handle)
    if not _live and _hook is not None:
        _hook.remove()
        _hook = None


def _stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
    for handle in list(_live):
        handle.stepped(optimizer)
