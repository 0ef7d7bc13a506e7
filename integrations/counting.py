"""The terms of an optimizer step, counted ahead of its forwards, and whether the forwards then had
as many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .deferred import Deferred
from .handle import PreHandle
from .task_loss import sum_dtype, without_pre


@dataclass
class Step:
    """An optimizer step.

    Attributes:
        size: the number of its micro-batches.
        divisor: what Σℓ of each is divided by, 0-d; None: their own means are taken.
        counts: the terms of each micro-batch that is still to come, 0-d; None where they cannot be
            counted.
        used: how many micro-batches came.
    """

    size: int
    divisor: Tensor | None = None
    counts: list[Tensor | None] = field(default_factory=list)
    used: int = 0


class Counting:
    """Of one training of one trainer.

    Attributes:
        ahead: whether terms are counted ahead; every process changes it at the same log.
        deferring: whether the losses of forwards are kept for `accelerator.backward`.
    """

    def __init__(self, handle: PreHandle, trainer: Any) -> None:
        self.handle = handle
        self.trainer = trainer
        self.ahead = True
        self.deferring = True
        self.reached = False  # whether losses came to accelerator.backward before
        self.step: Step | None = None
        self.later: list[Any] | None = None  # batches of a step that began while PRe was off
        # Since the last log: the number of micro-batches whose forwards had other terms than were
        # counted, the terms that were counted, and those that the forwards had.
        device = trainer.args.device
        self.sums = torch.zeros(3, dtype=sum_dtype(device), device=device)
        self.uncounted = 0  # micro-batches that could not be counted
        # Since the last log, of the micro-batches whose training_step was seen: the losses that it
        # returned, and PRe's part of them.
        self.losses = torch.zeros(2, dtype=sum_dtype(device), device=device)
        self.all_losses = (0.0, 0.0)  # those of all processes, as last combined
        self.logged_at = trainer.state.global_step  # the step of the last log

    def begin(self, batches: list[Any]) -> None:
        """A step of these batches begins; collective while terms are counted ahead."""
        if self.deferring and self.step is not None and self.step.size and not self.step.used:
            self.handle.notices.warn(
                "training_step not reached", trainer=type(self.trainer).__name__
            )
        self.step = Step(len(batches))
        self.later = None
        if not self.ahead:
            return
        self.step.counts = [self._count(batch) for batch in batches]
        known = [count for count in self.step.counts if count is not None]
        device = self.trainer.args.device
        total = over_processes(
            self.trainer, sum(known, torch.zeros((), dtype=torch.long, device=device))
        )
        if known:
            # the processes' gradients are averaged, so each divides by its part of the global count
            self.step.divisor = total.clamp(min=1).float() / self.trainer.accelerator.num_processes

    def _count(self, batch: Any) -> Tensor | None:
        """A batch's terms; None where its forward will be given something else, which may work for
        all that."""
        trainer = type(self.trainer).__name__
        if not hasattr(batch, "keys"):
            reason = f"they are not mappings but {type(batch).__name__}"
        else:
            try:
                return self.handle.count(dict(batch)).to(self.trainer.args.device)
            except Exception as error:  # mask_fn is the user's
                reason = f"{type(error).__name__}: {error}"
        self.handle.notices.warn("not counted", trainer=trainer, reason=reason)
        return None

    def micro_batch(self) -> Step:
        """The step of the micro-batch that begins; its first count is this one's."""
        if self.later:
            self.begin(self.later)
        if self.step is None or self.step.used == self.step.size:
            self.handle.notices.warn(
                "get_batch_samples not reached", trainer=type(self.trainer).__name__
            )
            self.step = Step(self.trainer.args.gradient_accumulation_steps)
        self.step.used += 1
        return self.step

    def wait(self, batches: list[Any]) -> None:
        """A step of these batches begins with PRe off; they are counted if it is on when they are
        trained."""
        self.step = None
        self.later = batches

    def skip(self) -> None:
        """A micro-batch is trained with PRe off."""
        if self.later:
            self.later = self.later[1:]
        elif self.step is not None and self.step.used < self.step.size:
            self.step.used += 1
            self.step.counts[:1] = []

    def saw(self, deferred: Deferred, uncounted: bool) -> None:
        """Compare what was counted for a micro-batch with what its forwards had; no host sync."""
        if uncounted:
            self.uncounted += 1
        elif deferred.counted is not None and torch.is_tensor(deferred.seen):
            counted = deferred.counted.to(self.sums)
            seen = deferred.seen.to(self.sums)
            self.sums = self.sums + torch.stack([(counted != seen).to(self.sums), counted, seen])

    def returned(self, loss: Tensor | float, added: Tensor | float) -> None:
        """A micro-batch's loss, as training_step returns it, and PRe's part of it, summed as the
        Trainer sums them; no host sync."""
        sums = self.losses
        values = [
            value.detach().to(sums) if torch.is_tensor(value) else sums.new_full((), value)
            for value in (loss, added)
        ]
        pair = torch.stack(values)
        if self.trainer.args.logging_nan_inf_filter:
            # The Trainer logs the mean of the steps before instead of a loss that is not finite.
            steps = 1 + self.trainer.state.global_step - self.logged_at
            pair = torch.where(values[0].isfinite(), pair, sums / steps)
        self.losses = sums + pair

    def task_loss(self, logged: float) -> float | None:
        """`logged`, the loss of a log whose sums have just been combined, without PRe's part; None
        where that is not known exactly."""
        steps = self.trainer.state.global_step - self.logged_at
        self.logged_at = self.trainer.state.global_step
        if not steps:
            return None
        backward = self.handle.totals.backward
        mean = 1 / (steps * self.trainer.accelerator.num_processes)
        loss, added = self.all_losses
        return without_pre(logged, mean * (loss + backward.loss), mean * (added + backward.added))

    def combined(self) -> Callable[[Tensor], Tensor]:
        """For `PreHandle.metrics`: its totals over processes, and with them what was counted, which
        is judged."""

        def combine(totals: Tensor) -> Tensor:
            own = [self.losses.to(totals), self.sums.to(totals)]
            sums = [totals, *own, totals.new_tensor([self.uncounted])]
            combined = over_processes(self.trainer, torch.cat(sums))
            loss, added, differ, counted, seen, uncounted = combined[-6:].tolist()
            self.all_losses = loss, added
            self.losses = torch.zeros_like(self.losses)
            self.sums = torch.zeros_like(self.sums)
            self.uncounted = 0
            if differ:
                self.handle.notices.warn("counted otherwise", counted=int(counted), seen=int(seen))
            self.ahead &= not (differ or uncounted)
            return combined[:-6]

        return combine


def counting_of(trainer: Any, handle: PreHandle) -> Counting:
    """The trainer's of this training."""
    counting: Counting | None = getattr(trainer, "_pre_counting", None)
    if counting is None or counting.handle is not handle:
        counting = trainer._pre_counting = Counting(handle, trainer)
    return counting


def over_processes(trainer: Any, value: Tensor) -> Tensor:
    """The sum over all processes."""
    if trainer.accelerator.num_processes == 1:
        return value
    total: Tensor = trainer.accelerator.reduce(
        value.to(trainer.accelerator.device), reduction="sum"
    )
    return total
