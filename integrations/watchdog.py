"""Detect that L_PRe is never trained, for example because a trainer ignores `output.loss` or a loop
leaves the model in eval mode."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .notices import Notices

# Warn after this many backward passes, because a single one may only be a look at a gradient.
PATIENCE = 2


class Watchdog:
    """Warns once if several backward passes in a row did not reach the terms of their forwards, or
    their forwards had no terms. Does not wait for the device.

    Args:
        notices: the warnings of the handle.
        labels: the name of the forward's argument that makes it return a loss; None: `labels=None`.

    Attributes:
        advice: the remedy in the warning about lost terms.
        reason: why the current forward has no term although it may be trained: "eval mode" or "no
            labels". None otherwise.
    """

    def __init__(self, notices: Notices, labels: str | None) -> None:
        self.notices = notices
        self.labels = labels
        self.advice = self.default = (
            "use patch_trainer(), or add output.loss" if labels else "add handle.loss() to the loss"
        )
        # The number of backward passes in a row that did not reach the term of their forward.
        self.lost = 0
        self.had_terms = False
        self.reason: str | None = None
        # The number of backward passes of forwards without a term, by reason.
        self.without: dict[str, int] = {}

    def begin(self, training: bool, labelled: bool) -> bool:
        """Begin a forward. Returns whether it gets a term: it does in training mode with labels.
        Warns if the last backward passes did not reach their terms, or had none."""
        if not training:
            self.reason = "eval mode" if labelled else None
        elif not labelled:
            self.reason = "no labels"
        self._check()
        return training and labelled

    def watch(self, term: Tensor, others: Iterable[Tensor]) -> None:
        """Follow a term of the loss. Nothing is kept longer than its graph.

        Args:
            term: the 0-d term.
            others: tensors from which the trainer could make another loss of this forward. A
                backward pass through them that leaves out `term` counts as lost. A forward without
                any backward pass (out of memory, or a loss that is only printed) does not count.
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
        """Follow the outputs of a forward that has no term, to see whether it is trained.

        If other forwards had labels, forwards without labels are trained by another loss on purpose
        (consistency, distillation), and are not followed.
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
        """Count the term as lost. If `reach` comes later in the same backward pass, it resets the
        count."""
        if not (self.reached or self.passed):
            self.passed = True
            self.watchdog.lost += 1
