"""Notices that L_PRe is computed but never trained: some trainers ignore `output.loss`."""

from __future__ import annotations

import warnings

from torch import Tensor

PATIENCE = 2  # a single forward may be somebody's look at the loss


class Watchdog:
    """Warns once when terms in a row were dropped without a backward pass that reached them; no host sync."""

    def __init__(self) -> None:
        self.lost = 0
        self.warned = False

    def watch(self, term: Tensor) -> None:
        """Follow a 0-d term of the loss; what follows it lives as long as its graph."""
        if term.requires_grad:
            term.register_hook(_Watched(self))

    def check(self) -> None:
        """Warn if the last terms were all lost."""
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
        self.reached = False

    def __call__(self, gradient: Tensor) -> None:
        self.reached = True
        self.watchdog.lost = 0

    def __del__(self) -> None:
        if not self.reached:
            self.watchdog.lost += 1
