"""The losses of the forwards of a micro-batch, kept until a trainer back-propagates a
loss of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Divisor = Tensor | float | None | Callable[[], Tensor]


class Deferred:
    """λ · L_PRe of the forwards inside `PreHandle.defer`, to be added to the loss that is
    back-propagated.

    With a `divisor` this is λ · Σℓ ÷ `divisor`. Without one, or if the forwards of a backward pass
    had more terms than were counted, it is their own mean divided by the number of micro-batches.
    Nothing is read on the host. Fewer terms than counted are normal: a micro-batch may be split,
    with a backward pass for each part.

    Args:
        divisor: Σℓ is divided by it: 0-d, a number, or a function that returns it, called at the
            end of the first forward. None: by the number of the forwards' terms.
        micro_batches: the number of micro-batches of the optimizer step.
        counted: the number of terms that the forwards should have, 0-d; None: not known.
        ungrouped: without a `divisor`, do not ask the group of `apply_pre` for one, because its
            other processes may have a divisor.
        alone: whether the trainer trains in this process alone, though there may be others.
    """

    def __init__(
        self,
        divisor: Divisor,
        micro_batches: int = 1,
        counted: Tensor | None = None,
        ungrouped: bool = False,
        alone: bool = False,
    ) -> None:
        self._divisor = divisor
        self.micro_batches = micro_batches
        self.counted = counted
        self.ungrouped = ungrouped
        self.alone = alone
        self.losses: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.seen: Tensor | int = 0  # the number of terms of all forwards
        self.added: Tensor | float = 0.0

    @property
    def divisor(self) -> Tensor | float | None:
        """The argument, or what it returned."""
        if callable(self._divisor):
            self._divisor = self._divisor()
        return self._divisor

    def add(self, loss: Tensor, count: Tensor) -> None:
        """Add a forward: λ · Σℓ ÷ `divisor`, or λ times its mean without a divisor, and the number
        of its terms; both 0-d."""
        self.losses.append(loss)
        self.counts.append(count.to(loss.device, non_blocking=True))
        self.seen = self.seen + self.counts[-1]

    def take(self) -> Tensor | None:
        """The loss of the forwards since the last call, 0-d; None if there were none."""
        losses = self.losses
        forwards_counts = self.counts
        self.losses = []
        self.counts = []
        if not losses:
            return None
        device = losses[0].device
        counts = torch.stack([count.to(device) for count in forwards_counts])
        values = torch.stack([loss.to(device) for loss in losses])
        count = counts.sum().clamp(min=1)
        divisor = self.divisor
        if divisor is None:
            total = (values * (counts / count)).sum() / self.micro_batches
        else:
            total = values.sum()
            if self.counted is not None:
                own = torch.as_tensor(divisor, device=device) / (count * self.micro_batches)
                total = total * torch.where(counts.sum() <= self.counted.to(device), 1.0, own)
        self.added = self.added + total.detach()
        return total


def added_to_backward(
    accelerator: Any, deferred: Deferred
) -> contextlib.AbstractContextManager[None]:
    """Inside it `accelerator.backward` adds to its loss what `deferred` has gathered."""
    backward = accelerator.backward

    def with_terms(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        term = deferred.take()
        return backward(loss if term is None else loss + term.to(loss.device), *args, **kwargs)

    return replaced(accelerator, "backward", with_terms)


@contextlib.contextmanager
def replaced(owner: Any, name: str, method: Any) -> Iterator[None]:
    """Inside it `owner` has `method` under `name`; its own is put back at the end."""
    own = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)
