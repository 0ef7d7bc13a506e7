"""float8 rows (e4m3) with one scale per row.

The passes over a chunk write its float8 rows, because they hold the rows in registers anyway. The
weights have a pass of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import WARPS, RowShape, cdiv, narrow, on_device, widen

# This is the largest number of e4m3.
LARGEST = tl.constexpr(448.0)
# This is the smallest scale: its inverse is still finite, and it rounds only numbers below 1e-32 to
# 0.
SMALLEST = tl.constexpr(1e-30)
# A program holds TALL × WIDE elements of a strip of columns at a time.
TALL = 256
WIDE = 32


class Quantized(NamedTuple):
    """Float8 rows: `values` (n, K) float8_e4m3fn contiguous and `scales` (n,) float32. A row is
    values · scale."""

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, like: Tensor, n: int, width: int) -> Quantized:
        values = like.new_empty(n, width, dtype=torch.float8_e4m3fn)
        return cls(values, like.new_empty(n, dtype=torch.float32))

    def rows(self, n: int, width: int) -> Quantized:
        """Return a part of the memory as (n, width)."""
        return Quantized(self.values.view(-1)[: n * width].view(n, width), self.scales[:n])


@triton.jit
def scale_of(largest):
    """Return the scale of a row whose largest element is `largest`, and the inverse by which to
    multiply."""
    scale = tl.maximum(largest * (1.0 / LARGEST), SMALLEST)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def store_quantized(q_ptr, scales_ptr, b_x, o_n, o_b, last, columns):
    """Store the rows o_n < last of b_x (rows, block), where a block holds a whole row."""
    scale, inverse = scale_of(tl.max(tl.abs(b_x), 1))
    tl.store(scales_ptr + o_n, scale, mask=o_n < last)
    p_q = q_ptr + o_n.to(tl.int64)[:, None] * columns + o_b[None, :]
    mask = (o_n < last)[:, None] & (o_b < columns)[None, :]
    tl.store(p_q, narrow(b_x * inverse[:, None], q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def quantize_rows(w_ptr, q_ptr, scales_ptr, pid, M, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    o_m = pid * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, BLOCK)
    mask = (o_m < M)[:, None] & (o_k < K)[None, :]
    b_w = widen(tl.load(w_ptr + o_m.to(tl.int64)[:, None] * K + o_k[None, :], mask=mask, other=0.0))
    store_quantized(q_ptr, scales_ptr, b_w, o_m, o_k, M, K)


@triton.jit
def quantize_columns(w_ptr, q_ptr, scales_ptr, pid, M, K, TALL: tl.constexpr, WIDE: tl.constexpr):
    """Write the columns of w (M, K) to the rows of q (K, M). Each strip is read twice, the second
    time from the L2 cache."""
    o_k = pid * WIDE + tl.arange(0, WIDE)
    b_largest = tl.zeros((TALL, WIDE), tl.float32)
    for first in range(0, M, TALL):
        o_m = first + tl.arange(0, TALL)
        mask = (o_m < M)[:, None] & (o_k < K)[None, :]
        b_w = widen(
            tl.load(w_ptr + o_m.to(tl.int64)[:, None] * K + o_k[None, :], mask=mask, other=0.0)
        )
        b_largest = tl.maximum(b_largest, tl.abs(b_w))
    scale, inverse = scale_of(tl.max(b_largest, 0))
    tl.store(scales_ptr + o_k, scale, mask=o_k < K)
    for first in range(0, M, TALL):
        o_m = first + tl.arange(0, TALL)
        mask = (o_m < M)[:, None] & (o_k < K)[None, :]
        b_w = widen(
            tl.load(w_ptr + o_m.to(tl.int64)[:, None] * K + o_k[None, :], mask=mask, other=0.0)
        )
        b_q = tl.trans(narrow(b_w * inverse[None, :], q_ptr.dtype.element_ty))
        p_q = q_ptr + o_k.to(tl.int64)[:, None] * M + o_m[None, :]
        tl.store(p_q, b_q, mask=(o_k < K)[:, None] & (o_m < M)[None, :])


@triton.jit
def quantize_kernel(
    w_ptr,  # (M, K)
    rows_ptr,  # (M, K) float8
    row_scales_ptr,  # (M,)
    columns_ptr,  # (K, M) float8
    column_scales_ptr,  # (K,)
    M,
    K,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Quantise both layouts of a weight in one grid. The strips of columns come first, because they
    take longest."""
    strips = 0
    pid = tl.program_id(0)
    if columns_ptr is not None:
        strips = tl.cdiv(K, WIDE)
        if pid < strips:
            quantize_columns(w_ptr, columns_ptr, column_scales_ptr, pid, M, K, TALL, WIDE)
    if pid >= strips:
        quantize_rows(w_ptr, rows_ptr, row_scales_ptr, pid - strips, M, K, ROWS, BLOCK)


def quantize_weight(w: Tensor, columns: bool) -> tuple[Quantized, Quantized | None]:
    """Quantise w along its rows, and with `columns` along its columns as (K, M), in one launch.

    w: (M, K) contiguous with K of at most 8,192.
    """
    rows = Quantized.empty(w, *w.shape)
    strips = Quantized.empty(w, *w.t().shape) if columns else None
    M, K = w.shape
    shape = RowShape.of(K)
    with on_device(w):
        quantize_kernel[(cdiv(K, WIDE) * columns + cdiv(M, shape.rows),)](
            w,
            *rows,
            *(strips or (None, None)),
            M,
            K,
            TALL=TALL,
            WIDE=WIDE,
            num_warps=WARPS,
            **shape.constants,
        )
    return rows, strips
