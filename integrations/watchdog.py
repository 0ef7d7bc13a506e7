"""Notices that L_PRe is computed but never trained: some trainers ignore `output.loss`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor

PATIENCE = 2  # a single one may be somebody's look at a gradient


class Watchdog:
    """Warns once when backward passes of forwards in a row left out their terms; no host sync."""

    def __init__(self) -> None:
        self.lost = 0
        self.warned = False

    def watch(self, term: Tensor, others: Iterable[Tensor]) -> None:
        """Follow a 0-d term of the loss; nothing is kept longer than its graph.

        `others`: what another loss of this forward would be made of. A forward whose backward pass never came, for want
        of memory or because its loss was only looked at, says nothing about the trainer.
        """
        if not term.requires_grad:
            return
        watched = _Watched(self)
        term.register_hook(watched.reach)
        for other in others:
            if other.requires_grad:
                other.register_hook(watched.pass_by)

    def check(self) -> None:
        """Warn if the last backward passes all left out their terms."""
        if self.lost >= PATIENCE and not self.warned:
            self.warned = True
            warnings.warn(
                f"PRe: the last {self.lost} L_PRe were computed but never back-propagated, so the head does not train: "
                "the trainer has a loss of its own instead of output.loss; use patch_trainer(), or add output.loss",
                stacklevel=2,
            )


class _Watched:
    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.reached = self.passed = False

    def reach(self, gradient: Tensor) -> None:
        self.reached = True
        self.watchdog.lost = 0

    def pass_by(self, gradient: Tensor) -> None:
        """May come before `reach` in the same backward pass, which then takes it back."""
        if not (self.reached or self.passed):
            self.passed = True
            self.watchdog.lost += 1
