"""A layer whose forward `kernels.kernelize` puts into a module that computes the loss itself."""

from __future__ import annotations

import torch
from torch import nn

from .loss import fused_pre_loss


class PreLoss(nn.Module):
    """The PRe loss by the parameters of the module that adopts this forward.

    That module has `w1` (m, d), `b1` (m,) or None, `w2` (z, m), `b2` (z,) or None, in the layout of
    `nn.Linear`, and the texts `loss` ("cosine", "mse", "smooth_l1" or "gram") and `activation`
    ("gelu", "gelu_tanh", "silu" or "relu"). Its own forward computes
    `reference.pre_loss(hidden, anchor, w1, b1, w2, b2, rows, loss=loss, activation=activation)`.

    Args of the forward:
        hidden: (..., d) hidden states, outside autocast in the dtype of the parameters.
        anchor: hidden's leading shape + (z,), or (N, z) for the N selected rows.
        rows: a bool mask of hidden's leading shape, (N,) int32 or int64 indices, or None for all
            rows.

    The forward returns a 0-d tensor, the mean over the rows. It raises the errors of
    `fused_pre_loss`, and an AttributeError if the module lacks one of the names above.
    """

    # No annotations of the parameters: on Python 3.14 they are one more member of the class, and
    # `kernelize` allows none.
    can_torch_compile = True

    def forward(
        self, hidden: torch.Tensor, anchor: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        return fused_pre_loss(
            hidden,
            anchor,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            rows,
            loss=self.loss,
            activation=self.activation,
        )
