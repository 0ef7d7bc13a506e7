"""Notices that L_PRe is never trained: some trainers ignore `output.loss`, some loops leave the model in eval mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor

PATIENCE = 2  # a single one may be somebody's look at a gradient


class Watchdog:
    """Warns once when backward passes in a row left out their forwards' terms, or there were none; no host sync."""

    def __init__(self) -> None:
        self.lost = self.evaluated = 0
        self.warned = self.warned_eval = False

    def watch(self, term: Tensor, others: Iterable[Tensor]) -> None:
        """Follow a 0-d term of the loss; nothing is kept longer than its graph.

        `others`: what another loss of this forward would be made of. A forward whose backward pass never came, for want
        of memory or because its loss was only looked at, says nothing about the trainer.
        """
        self.evaluated = 0
        if not term.requires_grad:
            return
        watched = _Watched(self)
        term.register_hook(watched.reach)
        for other in others:
            if other.requires_grad:
                other.register_hook(watched.pass_by)

    def watch_eval(self, losses: Iterable[Tensor]) -> None:
        """Follow what a forward in eval mode, which has no term, may be trained by."""
        for loss in losses:
            if loss.requires_grad:
                loss.register_hook(self._trained_in_eval)

    def _trained_in_eval(self, gradient: Tensor) -> None:
        self.evaluated += 1

    def check(self) -> None:
        """Warn if the last backward passes all left out their terms, or were of forwards in eval mode."""
        if self.evaluated >= PATIENCE and not self.warned_eval:
            self.warned_eval = True
            warnings.warn(
                f"PRe: the last {self.evaluated} backward passes were of forwards in eval mode, which have no L_PRe, "
                "so the head does not train; call model.train() before training",
                stacklevel=2,
            )
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
