"""Whether the optimizers of this process step the head and the model: torch's own hook tells, without a host sync."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Steps:
    """The optimizer steps since it was made, of every `torch.optim.Optimizer` in this process, until `remove()`.

    Attributes:
        count: of the steps.
    """

    def __init__(self) -> None:
        self.count = 0
        self.optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.judged = 0  # the number of optimizers at the last verdict
        _watch(self)

    def __reduce__(self) -> Any:
        return Steps, ()  # copies and pickles of a model have seen nothing

    def remove(self) -> None:
        """See no more steps."""
        _live.discard(self)
        _unhook()

    def see(self, optimizer: Any) -> None:
        """A step of `optimizer` begins."""
        self.count += 1
        self.optimizers.add(optimizer)

    def verdict(self, model: nn.Module, head: nn.Module) -> str | None:
        """What the optimizers that have stepped leave out: "head", "model" (all of it but the head), or None.

        None too while none of them has a parameter of the model: an engine that keeps copies steps those.
        """
        if self.judged == len(self.optimizers):
            return None
        self.judged = len(self.optimizers)
        mine, others = split(model, head)
        held = {id(p) for optimizer in self.optimizers for p in parameters(optimizer)}
        if not held & (mine | others):
            return None
        if mine - held:
            return "head"
        return "model" if mine and others and not others & held else None


def split(model: nn.Module, head: nn.Module) -> tuple[set[int], set[int]]:
    """The ids of the parameters that require grad: the head's, and the others of the model."""
    mine = {id(p) for p in head.parameters()}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return mine & trained, trained - mine


def parameters(optimizer: Any) -> Iterable[Any]:
    """All parameters of an optimizer's groups."""
    return (p for group in optimizer.param_groups for p in group["params"])


def unwrapped(optimizer: Any) -> Any:
    """The innermost of wrappers such as accelerate's and DeepSpeed's, which keep what they wrap as `.optimizer`."""
    while not (isinstance(optimizer, torch.optim.Optimizer) and "optimizer" not in vars(optimizer)):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    return optimizer


_live: weakref.WeakSet[Steps] = weakref.WeakSet()
_hook: RemovableHandle | None = None  # one for all, and only as long as there is somebody to tell


def _watch(steps: Steps) -> None:
    global _hook
    _live.add(steps)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_stepped)


def _unhook() -> None:
    global _hook
    if not _live and _hook is not None:
        _hook.remove()
        _hook = None


def _stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
    for steps in list(_live):
        steps.see(optimizer)
