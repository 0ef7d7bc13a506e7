"""Loss and derivative of each row in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, narrow, on_device, widen

TILE = 4096  # elements of a program: many short rows, one long row, or a longer one in blocks of that many columns


@triton.jit(do_not_specialize=["start", "n"])
def row_loss_kernel(
    p_ptr,  # (n, Z); dP is written over it
    a_ptr,  # (·, Z), gathered by index
    coefficient_ptr,  # (capacity,) float32
    losses_ptr,  # (capacity,) float32
    index_ptr,  # (capacity,)
    count_ptr,
    start,
    n,
    Z,
    stride_am,
    stride_az,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    GATHER: tl.constexpr,
    COUNT: tl.constexpr,
    WEIGH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    live = n
    if COUNT:
        live = tl.minimum(n, tl.load(count_ptr) - start)
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < live
    if GATHER:
        rows = tl.load(index_ptr + start + o_n, mask=m_n, other=0).to(tl.int64)
    else:
        rows = (start + o_n).to(tl.int64)
    p_p = p_ptr + o_n.to(tl.int64)[:, None] * Z  # (ROWS, 1)
    p_a = a_ptr + rows[:, None] * stride_am
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if WEIGH:
        weight = tl.load(coefficient_ptr + start + o_n, mask=m_n, other=0.0)
    o_b = tl.arange(0, BLOCK)[None, :]

    if LOSS == "cosine":
        b_pp = tl.zeros((ROWS, BLOCK), tl.float32)
        b_aa = tl.zeros((ROWS, BLOCK), tl.float32)
        for z in range(0, Z, BLOCK):
            mask = m_n[:, None] & (z + o_b < Z)
            b_p = widen(tl.load(p_p + z + o_b, mask=mask, other=0.0))
            b_a = widen(tl.load(p_a + (z + o_b) * stride_az, mask=mask, other=0.0))
            b_pp += b_p * b_p
            b_aa += b_a * b_a
        # as in F.cosine_similarity both norms are clamped at eps, and the derivative of p's norm is not
        norm = tl.sqrt_rn(tl.sum(b_pp, 1))
        p_norm = clamp_min(norm, 1e-8)
        a_norm = clamp_min(tl.sqrt_rn(tl.sum(b_aa, 1)), 1e-8)
        b_cosine = tl.zeros((ROWS, BLOCK), tl.float32)
        for z in range(0, Z, BLOCK):
            mask = m_n[:, None] & (z + o_b < Z)
            b_p = widen(tl.load(p_p + z + o_b, mask=mask, other=0.0))
            b_a = widen(tl.load(p_a + (z + o_b) * stride_az, mask=mask, other=0.0))
            b_cosine += (b_p / p_norm[:, None]) * (b_a / a_norm[:, None])
        cosine = tl.sum(b_cosine, 1)
        loss = -cosine
        along = tl.where(norm == 0.0, 0.0, cosine * (p_norm / norm))
    else:
        b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        for z in range(0, Z, BLOCK):
            mask = m_n[:, None] & (z + o_b < Z)
            b_p = widen(tl.load(p_p + z + o_b, mask=mask, other=0.0))
            b_d = b_p - widen(tl.load(p_a + (z + o_b) * stride_az, mask=mask, other=0.0))
            if LOSS == "mse":
                b_sum += b_d * b_d
            else:
                b_slope = clamp_one(b_d)
                b_sum += b_slope * (b_d - 0.5 * b_slope)
        loss = tl.sum(b_sum, 1) / Z
    tl.store(losses_ptr + start + o_n, weight * loss, mask=m_n)

    if GRAD:
        for z in range(0, Z, BLOCK):
            mask = m_n[:, None] & (z + o_b < Z)
            b_p = widen(tl.load(p_p + z + o_b, mask=mask, other=0.0))
            b_a = widen(tl.load(p_a + (z + o_b) * stride_az, mask=mask, other=0.0))
            if LOSS == "cosine":
                # d(-cos)/dp = (cos · p/|p| - a/|a|) / |p|; unit vectors cancel exactly where p and a are parallel
                b_dp = along[:, None] * (b_p / p_norm[:, None]) - b_a / a_norm[:, None]
                b_dp *= (weight / p_norm)[:, None]
            elif LOSS == "mse":
                b_dp = (weight * 2.0 / Z)[:, None] * (b_p - b_a)
            else:
                b_dp = (weight / Z)[:, None] * clamp_one(b_p - b_a)
            tl.store(p_p + z + o_b, narrow(b_dp, p_ptr.dtype.element_ty), mask=mask)


@triton.jit
def clamp_min(x, low):
    return tl.where(x < low, low, x)  # a NaN stays one


@triton.jit
def clamp_one(x):
    return tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))


def row_loss(
    p: Tensor,
    anchor: Tensor,
    losses: Tensor,
    *,
    loss: str,
    grad: bool,
    coefficient: Tensor | None = None,
    index: Tensor | None = None,
    count: Tensor | None = None,
    start: int = 0,
) -> None:
    """losses[start + i] = coefficient · ℓ(p[i], anchor[index[start + i]]); with `grad` p becomes coefficient · dℓ/dp.

    p: (n, Z) contiguous; anchor: (·, Z), any strides and floating dtype; losses and coefficient: (capacity,) float32;
    index: (capacity,) rows of anchor, None = anchor row start + i; count: 0-d int32, rows from there on are left alone.
    """
    n, Z = p.shape
    block = min(TILE, triton.next_power_of_2(Z))
    rows = TILE // block
    with on_device(p):
        row_loss_kernel[(triton.cdiv(n, rows),)](
            p,
            anchor,
            coefficient,
            losses,
            index,
            count,
            start,
            n,
            Z,
            *anchor.stride(),
            LOSS=loss,
            GRAD=grad,
            GATHER=index is not None,
            COUNT=count is not None,
            WEIGH=coefficient is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=8,
            **OPTIONS,
        )
