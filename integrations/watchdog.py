"""Notices that L_PRe is never trained: a trainer ignores `output.loss`, a loop leaves the model in
eval mode, ..."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .notices import Notices

# Backward passes before a warning: a single one may be somebody's look at a gradient.
PATIENCE = 2


class Watchdog:
    """Warns once when backward passes in a row left out their forwards' terms, or there were none;
    no host sync.

    Attributes:
        advice: what to do where terms are lost.
        labels: the argument that a forward in training has.
        reason: why the forward that runs has no term although it may be trained, "eval mode" or "no
            labels"; else None.
    """

    def __init__(self, notices: Notices, labels: str | None) -> None:
        self.notices = notices
        self.labels = labels
        self.advice = self.default = (
            "use patch_trainer(), or add output.loss" if labels else "add handle.loss() to the loss"
        )
        self.lost = 0  # backward passes in a row that left out their forward's term
        self.had_terms = False
        self.reason: str | None = None
        # backward passes of forwards without a term, by the reason
        self.without: dict[str, int] = {}

    def begin(self, training: bool, labelled: bool) -> bool:
        """Whether the forward that begins gets a term: one in training that has labels. Warns if
        the last backward passes all left out their terms, or were of forwards without one."""
        if not training:
            self.reason = "eval mode" if labelled else None
        elif not labelled:
            self.reason = "no labels"
        self._check()
        return training and labelled

    def watch(self, term: Tensor, others: Iterable[Tensor]) -> None:
        """Follow a 0-d term of the loss; nothing is kept longer than its graph.

        `others`: what another loss of this forward would be made of. A forward whose backward pass
        never came, for want of memory or because its loss was only looked at, says nothing about
        the trainer.
        """
        self.without.clear()
        self.had_terms = True
        if not term.requires_grad:
            return
        watched = _Watched(self)
        term.register_hook(watched.reach)
        for other in others:
            if other.requires_grad:
                other.register_hook(watched.pass_by)

    def watch_without(self, outputs: Iterable[Tensor]) -> None:
        """Follow what a forward that has no term, for `reason`, may be trained by.

        Where others had labels, those without are trained by something else on purpose
        (consistency, distillation).
        """
        reason = self.reason
        if reason is None or (reason == "no labels" and self.had_terms):
            return

        def trained(gradient: Tensor) -> None:
            self.without[reason] = self.without.get(reason, 0) + 1

        for output in outputs:
            if output.requires_grad:
                output.register_hook(trained)
                return

    def _check(self) -> None:
        for reason, count in self.without.items():
            if count >= PATIENCE:
                self.notices.warn(reason, count=count, labels=self.labels)
        if self.lost >= PATIENCE:
            self.notices.warn("lost", count=self.lost, advice=self.advice)


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
