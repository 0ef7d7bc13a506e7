"""The checked arguments of one call, which travel from `fused_pre_loss` to the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The first fields of a `Problem`: hidden, and weight and bias of each of three layers and of the
# norm.
DIFFERENTIABLE = 9
# Those whose gradients are sums over rows without a matmul.
COLUMN_SUMS = (2, 4, 6, 7, 8)


class Options(NamedTuple):
    """The arguments of a call that are not tensors."""

    loss: str
    activation: str
    reduction: str
    dtype: torch.dtype  # the dtype of the products
    anchor_compact: bool
    weight_compact: bool
    images_compact: bool
    divisor: float | None  # the normalizer if it is a number
    workspace: int | None  # bytes
    capacity: int | None  # the most rows that a mask may select
    precision: str | None  # "fp8", or None for the products' dtype
    norm: str | None = None  # "layer" or "rms", or None for rows of hidden as they are
    norm_eps: float = 0.0


class Problem(NamedTuple):
    """The checked arguments of one call. Leading shapes are flattened: there are R rows in all, and
    N of them are selected.

    The head has one to three layers: weights and biases of the others are None. The first
    `DIFFERENTIABLE` fields are those that may receive a gradient.
    """

    hidden: Tensor  # (R, d)
    w1: Tensor  # (widths[1], d)
    b1: Tensor | None  # (widths[1],)
    w2: Tensor | None  # (widths[2], widths[1])
    b2: Tensor | None
    w3: Tensor | None
    b3: Tensor | None
    norm_weight: Tensor | None  # (d,) contiguous
    norm_bias: Tensor | None
    anchor: Tensor  # (R, z), or (N, z) if anchor_compact; detached
    rows: Tensor | None  # (R,) bool | (N,) int | None = all
    weight: Tensor | None  # (R,), or (N,) if weight_compact
    images: Tensor | None  # (R,) int, or (N,) if images_compact
    normalizer: Tensor | None  # 0-d
    options: Options

    @property
    def loss_dtype(self) -> torch.dtype:
        """The dtype of the loss arithmetic and of the result."""
        return torch.promote_types(self.options.dtype, torch.float32)

    @property
    def layers(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each layer."""
        layers = [(self.w1, self.b1)]
        if self.w2 is not None:
            layers.append((self.w2, self.b2))
        if self.w3 is not None:
            layers.append((self.w3, self.b3))
        return layers

    @property
    def widths(self) -> tuple[int, ...]:
        """The width d of hidden, then the output width of each layer; the last is z."""
        return (self.hidden.shape[1], *[w.shape[0] for w, _ in self.layers])

    @property
    def masked(self) -> bool:
        return self.rows is not None and self.rows.dtype == torch.bool

    @property
    def count_on_host(self) -> bool:
        """Whether the host must know N, because N shapes the result or the Gram matrices, or has to
        match a compact anchor or weight."""
        return (
            self.options.reduction == "none"
            or self.options.loss == "gram"
            or self.options.anchor_compact
            or self.options.weight_compact
        )

    @property
    def bound(self) -> int:
        """The most rows that can be selected, from shapes and capacity."""
        if self.rows is None or not self.masked:
            return self.hidden.shape[0] if self.rows is None else self.rows.shape[0]
        return self.hidden.shape[0] if self.options.capacity is None else self.options.capacity

    def parameters(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return `layers` in the products' dtype, contiguous: a matmul sums tensors of other
        strides in another order, which at small widths doubles the error."""
        dtype = self.options.dtype
        return [
            (w.to(dtype).contiguous(), None if b is None else b.to(dtype).contiguous())
            for w, b in self.layers
        ]
