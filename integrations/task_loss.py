"""The logged loss without PRe's part of it: exact, or not there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A log may round the loss to 4 decimals, and sums it in float32, which this allows for.
TOLERANCE = 1e-4


class BackwardLosses:
    """Two sums over the forwards that had L_PRe added to `output.loss`: Σ g · loss and Σ g · added,
    where g is the derivative of the back-propagated loss with respect to `output.loss`. No host
    sync.

    If a trainer reports the loss that it back-propagates, and that is a multiple of `output.loss`,
    the first sum is the reported loss, and the second is PRe's part of it.

    Attributes:
        sums: since the last reset, in this process, (2,); None before the first backward pass.
        loss, added: the two sums over all processes, as they were last read.
        forwards: the number of such forwards at that time, back-propagated or not.
    """

    # the names of the sums in `packed`
    NAMES = ("backward_loss", "backward_added")

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.loss = 0.0
        self.added = 0.0
        self.forwards = 0

    def watch(self, loss: Tensor, added: Tensor) -> None:
        """Add a forward when it is back-propagated: its `output.loss` and PRe's part of that, both
        0-d. The graph is not kept."""
        if not loss.requires_grad:
            return
        values = torch.stack([loss.detach(), added.detach().to(loss.device)])
        values = values.to(sum_dtype(loss.device))

        def reached(gradient: Tensor) -> None:
            part = values * gradient.to(values)
            self.sums = part if self.sums is None else self.sums + part

        loss.register_hook(reached)

    def packed(self, like: Tensor) -> Tensor:
        """The sums, (2,) with dtype and device of `like`. Values of several processes may be
        added."""
        return like.new_zeros(2) if self.sums is None else self.sums.to(like)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums on `device`: float64 if the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_pre(logged: float, loss: float, added: float) -> float | None:
    """`logged` less `added`, PRe's part of `loss`. None if `loss` is not what was logged, or the
    result is not finite."""
    if not abs(loss - logged) <= TOLERANCE * (1 + abs(logged)):
        return None
    task = logged - added
    return task if math.isfinite(task) else None
