"""The logged loss without PRe's part of it: exact, or not there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A log may round the loss to 4 decimals, and sums it in float32.
TOLERANCE = 1e-4


class BackwardLosses:
    """Sums over the forwards that had L_PRe added to `output.loss`, of what entered the losses that
    were back-propagated; no host sync.

    A forward counts with g · loss and g · added, where g is the derivative of the back-propagated
    loss by `output.loss`. Where a trainer reports the loss that it back-propagates, the first sum
    is what it reports, and the second is PRe's part of that.
    """

    # the names of the sums in `packed`
    NAMES = ("backward_loss", "backward_added")

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (2,); None before the first backward pass
        self.loss = 0.0  # the first sum as it was last read
        self.added = 0.0  # the second one
        self.forwards = (
            0  # the forwards of all processes when that was read, back-propagated or not
        )

    def watch(self, loss: Tensor, added: Tensor) -> None:
        """Follow `output.loss`, 0-d, of which `added`, 0-d, is PRe's part; the graph is not
        kept."""
        if not loss.requires_grad:
            return
        values = torch.stack([loss.detach(), added.detach().to(loss.device)])
        values = values.to(sum_dtype(loss.device))

        def reached(gradient: Tensor) -> None:
            part = values * gradient.to(values)
            self.sums = part if self.sums is None else self.sums + part

        loss.register_hook(reached)

    def packed(self, like: Tensor) -> Tensor:
        """The sums, (2,) as `like`; those of several processes are added."""
        return like.new_zeros(2) if self.sums is None else self.sums.to(like)


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_pre(logged: float, loss: float, added: float) -> float | None:
    """`logged` less `added`.

    None unless `loss`, from whose parts `added` is known, is what was logged.
    """
    if not abs(loss - logged) <= TOLERANCE * (1 + abs(logged)):
        return None
    task = logged - added
    return task if math.isfinite(task) else None
