"""Compute a Gram loss of rows, and the matrix of its derivative, from the two Gram matrices."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, cdiv, narrow, on_device

ROWS = 4
BLOCK = 1024


@triton.jit(do_not_specialize=["row", "m", "n"])
def gram_kernel(
    s_ptr,  # (m, n) float32
    t_ptr,  # (m, n) float32
    e_ptr,  # (m, n)
    losses_ptr,  # (n,) float32
    weight_ptr,  # (n,) float32
    factor_ptr,  # (n,) float32, or 0-d
    row,
    m,
    n,
    GRAD: tl.constexpr,
    FACTOR_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_m = o_m < m
    inverse = tl.div_rn(1.0, n * 1.0)
    total = tl.zeros((ROWS,), tl.float32)
    if GRAD:
        factor = tl.load(factor_ptr + (row + o_m if FACTOR_ROWS else o_m * 0), mask=m_m, other=0.0)
    for first in range(0, n, BLOCK):
        o_n = first + tl.arange(0, BLOCK)
        mask = m_m[:, None] & (o_n < n)[None, :]
        o_s = o_m.to(tl.int64)[:, None] * n + o_n[None, :]
        b_d = tl.load(s_ptr + o_s, mask=mask, other=0.0)
        b_d -= tl.load(t_ptr + o_s, mask=mask, other=0.0)
        total += tl.sum(b_d * b_d, 1)
        if GRAD:
            # An element belongs to the losses of its row and of its column.
            if FACTOR_ROWS:
                other = tl.load(factor_ptr + o_n, mask=o_n < n, other=0.0)
                b_d *= factor[:, None] + other[None, :]
            else:
                b_d *= (2.0 * factor)[:, None]
            b_d *= 2.0 * inverse
            tl.store(e_ptr + o_s, narrow(b_d, e_ptr.dtype.element_ty), mask=mask)
    if losses_ptr is not None:
        total *= inverse
        if weight_ptr is not None:
            total *= tl.load(weight_ptr + row + o_m, mask=m_m, other=0.0)
        tl.store(losses_ptr + row + o_m, total, mask=m_m)


def gram_rows(
    s: Tensor,
    t: Tensor,
    e: Tensor | None,
    losses: Tensor | None,
    *,
    weight: Tensor | None,
    factor: Tensor,
    row: int,
) -> None:
    """From rows [row, row + m) of the Gram matrices of an image of n rows, write the losses
    weight_i · Σ_j (s - t)² / n, and the derivative of factor_i · weight_i · ℓ_i by s, e.

    s, t: (m, n) float32. e: (m, n), or None. losses: (n,) float32, or None. weight: (n,) float32;
    None: 1. factor: (n,) with the weight in it, or 0-d; float32.
    """
    m, n = s.shape
    with on_device(s):
        gram_kernel[(cdiv(m, ROWS),)](
            s,
            t,
            e,
            losses,
            weight,
            factor,
            row,
            m,
            n,
            GRAD=e is not None,
            FACTOR_ROWS=factor.dim() == 1,
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=8,
            **OPTIONS,
        )
