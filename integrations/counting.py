"""The terms of an optimizer step, counted before its forwards and compared with what the forwards
have; and the loss that a trainer logs, less PRe's part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .deferred import Deferred
from .distributed import Sum, initialized
from .handle import PreHandle
from .task_loss import sum_dtype, without_pre


@dataclass
class Step:
    """An optimizer step.

    Attributes:
        size: the number of its micro-batches.
        total: the number of its terms over all processes, 0-d; None if they were not counted.
        processes: the number of these processes.
        counts: the number of terms of each micro-batch to come, 0-d; None if it cannot be counted.
        used: the number of micro-batches that came.
    """

    size: int
    total: Sum | None = None
    processes: int = 1
    counts: list[Tensor | None] = field(default_factory=list)
    used: int = 0

    def divisor(self) -> Tensor:
        """Σℓ of each micro-batch is divided by it, 0-d. Gradients are averaged over processes, so
        it is the mean count of them. It waits for the processes' sum, so it is called only after
        the forward that needs it."""
        assert self.total is not None
        return self.total.wait().clamp(min=1).float() / self.processes


class Counting:
    """The counts and losses of one training of one trainer.

    Attributes:
        ahead: whether terms are counted ahead; every process changes it at the same log.
        deferring: whether the losses of forwards are kept for `accelerator.backward`.
    """

    def __init__(self, handle: PreHandle, trainer: Any) -> None:
        self.handle = handle
        self.trainer = trainer
        self.ahead = True
        self.deferring = True
        self.reached = False  # whether losses ever reached accelerator.backward
        self.step: Step | None = None
        self.later: list[Any] | None = None  # batches of a step that began while PRe was off
        # Three sums since the last log: micro-batches whose forwards had a different number of
        # terms than was counted, terms that were counted, and terms that the forwards had.
        device = trainer.args.device
        self.sums = torch.zeros(3, dtype=sum_dtype(device), device=device)
        self.uncounted = 0  # micro-batches that could not be counted
        # Two sums since the last log: the losses that `_training_step` returned to the trainer, and
        # PRe's part of them.
        self.losses = torch.zeros(2, dtype=sum_dtype(device), device=device)
        self.all_losses = (0.0, 0.0)  # the same over all processes, as last combined
        self.logged_at = trainer.state.global_step  # the step of the last log

    @property
    def alone(self) -> bool:
        """Whether this process trains alone, though there may be others."""
        return bool(self.trainer.accelerator.num_processes == 1)

    def begin(self, batches: list[Any]) -> None:
        """A step of these batches begins; collective while terms are counted ahead."""
        if self.deferring and self.step is not None and self.step.size and not self.step.used:
            self.handle.notices.warn(
                "training_step not reached", trainer=type(self.trainer).__name__
            )
        self.step = Step(len(batches))
        self.later = None
        if len(batches) > 1 and self.handle.settings()["anchor_norm"] == "center":
            self.handle.notices.warn("centered by micro-batch", count=len(batches))
        if not self.ahead:
            return
        self.step.counts = [self._count(batch) for batch in batches]
        known = [count for count in self.step.counts if count is not None]
        device = self.trainer.args.device
        own = sum(known, torch.zeros((), dtype=torch.long, device=device))
        self.step.total = self._over_processes(own)
        self.step.processes = self.trainer.accelerator.num_processes

    def _count(self, batch: Any) -> Tensor | None:
        """The number of terms of a batch. None if the batch is not what its forward will get; the
        forward may work all the same."""
        trainer = type(self.trainer).__name__
        if not hasattr(batch, "keys"):
            reason = f"they are not mappings but {type(batch).__name__}"
        else:
            try:
                return self.handle.count(dict(batch)).to(self.trainer.args.device)
            except Exception as error:  # mask_fn is the user's code, so it may raise anything
                reason = f"{type(error).__name__}: {error}"
        self.handle.notices.warn("not counted", trainer=trainer, reason=reason)
        return None

    def micro_batch(self) -> Step:
        """The step of the micro-batch that begins, with the count of this micro-batch first."""
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
        """A step of these batches begins with PRe off. They are counted if PRe is on when they are
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
        """Compare the counted terms of a micro-batch with those of its forwards; no host sync."""
        if uncounted:
            self.uncounted += 1
        elif deferred.counted is not None and torch.is_tensor(deferred.seen):
            counted = deferred.counted.to(self.sums)
            seen = deferred.seen.to(self.sums)
            self.sums = self.sums + torch.stack([(counted != seen).to(self.sums), counted, seen])

    def returned(self, loss: Tensor | float, added: Tensor | float) -> None:
        """Add the loss of a micro-batch, as the trainer gets it, and PRe's part of it; no host
        sync."""
        sums = self.losses
        values = [
            value.detach().to(sums) if torch.is_tensor(value) else sums.new_full((), value)
            for value in (loss, added)
        ]
        pair = torch.stack(values)
        if self.trainer.args.logging_nan_inf_filter:
            # Instead of a loss that is not finite the Trainer adds the mean of its sum so far.
            steps = 1 + self.trainer.state.global_step - self.logged_at
            pair = torch.where(values[0].isfinite(), pair, sums / steps)
        self.losses = sums + pair

    def task_loss(self, logged: float) -> float | None:
        """`logged`, the loss of the log whose sums were just combined, without PRe's part; None if
        that is not known exactly."""
        steps = self.trainer.state.global_step - self.logged_at
        self.logged_at = self.trainer.state.global_step
        if not steps:
            return None
        backward = self.handle.totals.backward
        mean = 1 / (steps * self.trainer.accelerator.num_processes)
        loss, added = self.all_losses
        return without_pre(logged, mean * (loss + backward.loss), mean * (added + backward.added))

    def combined(self) -> Callable[[Tensor], Tensor]:
        """For `PreHandle.metrics`: a function that sums its totals over processes, together with
        the sums of this object, and warns if forwards had other terms than were counted."""

        def combine(totals: Tensor) -> Tensor:
            own = [self.losses.to(totals), self.sums.to(totals)]
            sums = [totals, *own, totals.new_tensor([self.uncounted])]
            combined = self._over_processes(torch.cat(sums)).wait()
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

    def _over_processes(self, value: Tensor) -> Sum:
        accelerator = self.trainer.accelerator
        value = value.to(accelerator.device)
        if not self.alone and not initialized():  # TPUs
            value = accelerator.reduce(value, reduction="sum")
        return Sum(value, alone=self.alone)


def counting_of(trainer: Any, handle: PreHandle) -> Counting:
    """The `Counting` of this training of `trainer`."""
    counting: Counting | None = getattr(trainer, "_pre_counting", None)
    if counting is None or counting.handle is not handle:
        counting = trainer._pre_counting = Counting(handle, trainer)
    return counting
