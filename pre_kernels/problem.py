"""The checked arguments of one call, which travel from `fused_pre_loss` to the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """The arguments of a call that are not tensors."""

    loss: str
    activation: str
    reduction: str
    dtype: torch.dtype  # the dtype of the products
    anchor_compact: bool
    weight_compact: bool
    divisor: float | None  # the normalizer if it is a number
    workspace: int | None  # bytes
    capacity: int | None  # the most rows that a mask may select
    precision: str | None  # "fp8", or None for the products' dtype


class Problem(NamedTuple):
    """The checked arguments of one call. Leading shapes are flattened: there are R rows in all, and
    N of them are selected."""

    hidden: Tensor  # (R, d)
    w1: Tensor  # (m, d)
    b1: Tensor | None  # (m,)
    w2: Tensor  # (z, m)
    b2: Tensor | None  # (z,)
    anchor: Tensor  # (R, z), or (N, z) if anchor_compact; detached
    rows: Tensor | None  # (R,) bool | (N,) int | None = all
    weight: Tensor | None  # (R,), or (N,) if weight_compact
    normalizer: Tensor | None  # 0-d
    options: Options

    @property
    def loss_dtype(self) -> torch.dtype:
        """The dtype of the loss arithmetic and of the result."""
        return torch.promote_types(self.options.dtype, torch.float32)

    @property
    def widths(self) -> tuple[int, int, int]:
        """The widths (d, m, z)."""
        (m, d), (z, _) = self.w1.shape, self.w2.shape
        return d, m, z

    @property
    def masked(self) -> bool:
        return self.rows is not None and self.rows.dtype == torch.bool

    @property
    def count_on_host(self) -> bool:
        """Whether the host must know N, because N shapes the result or has to match a compact
        anchor or weight."""
        return (
            self.options.reduction == "none"
            or self.options.anchor_compact
            or self.options.weight_compact
        )

    @property
    def bound(self) -> int:
        """The most rows that can be selected, from shapes and capacity."""
        if self.rows is None or not self.masked:
            return self.hidden.shape[0] if self.rows is None else self.rows.shape[0]
        return self.hidden.shape[0] if self.options.capacity is None else self.options.capacity

    def parameters(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return w1, b1, w2, b2 in the products' dtype, contiguous: a matmul sums tensors of other
        strides in another order, which at small widths doubles the error."""
        w1, b1, w2, b2 = (
            None if x is None else x.to(self.options.dtype).contiguous()
            for x in (self.w1, self.b1, self.w2, self.b2)
        )
        assert w1 is not None
        assert w2 is not None
        return w1, b1, w2, b2
