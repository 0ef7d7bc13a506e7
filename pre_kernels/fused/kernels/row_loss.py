"""Compute loss and derivative of each row in one pass, with the column sums of the derivative."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    RowShape,
    add_column_sum,
    columns_of,
    live_rows,
    load_columns,
    narrow,
    on_device,
    sum_three,
    sum_two,
)
from .quantize import Quantized, store_quantized
from .rows import load_scale

# Each thread holds 32 bytes of a half-precision row. Twice as many warps would take half as many
# instructions again for a row, because each warp repeats the work that is done once per row.
WARPS = 8


@triton.jit(do_not_specialize=["start", "n"])
def row_loss_kernel(
    p_ptr,  # (n, Z); dP is written over it
    a_ptr,  # (·, Z), gathered by index
    weight_ptr,  # (·,) float32, gathered by index
    upstream_ptr,  # (capacity,), or 0-d
    divisor_ptr,  # 0-d float32
    losses_ptr,  # (capacity,) float32
    sums_ptr,  # (programs, Z) float32
    q_ptr,  # (n, Z) float8
    scales_ptr,  # (n,)
    index_ptr,  # (capacity,)
    count_ptr,
    start,
    n,
    Z,
    stride_am,
    stride_az,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    GATHER_ANCHOR: tl.constexpr,
    GATHER_WEIGHT: tl.constexpr,
    UPSTREAM_ROWS: tl.constexpr,
    SUM: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    ZERO_PADDING: tl.constexpr,  # dP of the rows beyond the count becomes 0
    WHOLE: tl.constexpr,  # a row fits one block
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    live = live_rows(count_ptr, start, n, COUNT)
    last = n if ZERO_PADDING else live
    o_b = tl.arange(0, BLOCK)
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    if SUM and FIRST and not WHOLE:
        for z in range(0, Z, BLOCK):
            add_column_sum(sums_ptr + z, b_sum, o_b, Z, Z - z, True)
    # If a row fits one block the bound is a compile-time constant, and the compiler removes loops.
    stop = BLOCK if WHOLE else Z
    # Sums begin at -0, because the compiler takes -0 + x to be x, while 0 + x is an addition.
    b_nothing = tl.zeros((ROWS, BLOCK), tl.float32) * -1.0
    # The values that all rows share are loaded before the loop, because the compiler does not move
    # a load over a store.
    inverse_width = tl.div_rn(1.0, Z * 1.0)
    if GRAD:
        factor = load_scale(None if UPSTREAM_ROWS else upstream_ptr, divisor_ptr)
    for first in range(tl.program_id(0) * ROWS, last, tl.num_programs(0) * ROWS):
        o_n = first + tl.arange(0, ROWS)
        m_n = o_n < live
        rows = (start + o_n).to(tl.int64)
        if GATHER_ANCHOR or GATHER_WEIGHT:
            selected = tl.load(index_ptr + start + o_n, mask=m_n, other=0).to(tl.int64)
        p_p = p_ptr + o_n.to(tl.int64)[:, None] * Z + o_b[None, :]
        p_a = a_ptr + (selected if GATHER_ANCHOR else rows)[:, None] * stride_am
        p_a += o_b.to(tl.int64)[None, :] * stride_az
        weight = tl.full((ROWS,), 1.0, tl.float32)
        if weight_ptr is not None:
            weight = tl.load(
                weight_ptr + (selected if GATHER_WEIGHT else rows), mask=m_n, other=0.0
            )
        b_p, b_a = None, None
        if WHOLE:
            b_p = load_columns(p_p, 0, Z, 1, m_n, o_b)
            b_a = load_columns(p_a, 0, Z, stride_az, m_n, o_b)

        if LOSS == "cosine":
            cosine, along, near, p_inverse, a_inverse = cosine_parts(
                b_p, b_a, p_p, p_a, Z, stride_az, m_n, o_b, b_nothing, stop, WHOLE, BLOCK
            )
            loss = -cosine
        elif LOSS == "mse" or LOSS == "smooth_l1":
            b_loss = b_nothing
            for z in range(0, stop, BLOCK):
                b_x, b_y = block_at(b_p, b_a, p_p, p_a, z, Z, stride_az, m_n, o_b, WHOLE)
                b_d = b_x - b_y
                if LOSS == "mse":
                    b_loss += b_d * b_d
                elif LOSS == "smooth_l1":
                    b_slope = clamp_one(b_d)
                    b_loss += b_slope * (b_d - 0.5 * b_slope)
            loss = tl.sum(b_loss, 1) * inverse_width
        else:
            tl.static_assert(False, "row_loss: no branch for this LOSS")
        if losses_ptr is not None:
            tl.store(losses_ptr + start + o_n, weight * loss, mask=m_n)

        if GRAD:
            if UPSTREAM_ROWS:
                weight *= tl.load(upstream_ptr + start + o_n, mask=m_n, other=0.0) * factor
            else:
                weight *= factor
            for z in range(0, stop, BLOCK):
                b_x, b_y = block_at(b_p, b_a, p_p, p_a, z, Z, stride_az, m_n, o_b, WHOLE)
                if LOSS == "cosine":
                    b_dp = cosine_grad(b_x, b_y, along, near, p_inverse, a_inverse)
                    b_dp *= (weight * p_inverse)[:, None]
                elif LOSS == "mse":
                    b_dp = (weight * 2.0 * inverse_width)[:, None] * (b_x - b_y)
                elif LOSS == "smooth_l1":
                    b_dp = (weight * inverse_width)[:, None] * clamp_one(b_x - b_y)
                b_dp = tl.where(m_n[:, None], b_dp, 0.0)
                m_out = (o_n < last)[:, None] & (z + o_b < Z)[None, :]
                tl.store(p_p + z, narrow(b_dp, p_ptr.dtype.element_ty), mask=m_out)
                if q_ptr is not None:
                    store_quantized(q_ptr, scales_ptr, b_dp, o_n, o_b, last, Z)
                if SUM:
                    if WHOLE:
                        b_sum += b_dp
                    else:
                        add_column_sum(sums_ptr + z, b_dp, o_b, Z, Z - z, False)
    if SUM and WHOLE:
        add_column_sum(sums_ptr, b_sum, o_b, Z, Z, FIRST)


@triton.jit
def block_at(b_p, b_a, p_p, p_a, z, Z, stride_az, m_n, o_b, WHOLE: tl.constexpr):
    """Return the columns z + o_b of the rows p and a, as `columns_of` does."""
    b_x = columns_of(b_p, p_p, z, Z, 1, m_n, o_b, WHOLE)
    return b_x, columns_of(b_a, p_a, z, Z, stride_az, m_n, o_b, WHOLE)


@triton.jit
def cosine_parts(
    b_p,
    b_a,
    p_p,
    p_a,
    Z,
    stride_az,
    m_n,
    o_b,
    b_nothing,
    stop,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return cos(p, a) of each row, and what `cosine_grad` needs: along, near, and the inverses of
    the clamped norms."""
    b_pp, b_aa, b_pa = b_nothing, b_nothing, b_nothing
    for z in range(0, stop, BLOCK):
        b_x, b_y = block_at(b_p, b_a, p_p, p_a, z, Z, stride_az, m_n, o_b, WHOLE)
        b_pp += b_x * b_x
        b_aa += b_y * b_y
        b_pa += b_x * b_y
    pp, aa, pa = sum_three(b_pp, b_aa, b_pa)
    # As in F.cosine_similarity, both norms are clamped at 1e-8, but the derivative is that of p's
    # unclamped norm.
    norm = tl.sqrt_rn(pp)
    p_norm = clamp_min(norm, 1e-8)
    # A GPU's `/` is off by up to 2 ulp, in the same direction for a whole row, and that error would
    # remain where the row's terms cancel. `div_rn` is rounded exactly.
    p_inverse = tl.div_rn(1.0, p_norm)
    a_inverse = tl.div_rn(1.0, clamp_min(tl.sqrt_rn(aa), 1e-8))
    # Split the unit anchor into near · u, its part along p, and a residual r. For nearly parallel
    # vectors r is tiny, and u · r is accurate to eps · |r|, where the cosine itself is accurate to
    # eps only. The derivation is in docs/numerics.md, "The cosine".
    near = pa * p_inverse * a_inverse
    b_pr, b_uu = b_nothing, b_nothing
    for z in range(0, stop, BLOCK):
        b_x, b_y = block_at(b_p, b_a, p_p, p_a, z, Z, stride_az, m_n, o_b, WHOLE)
        b_u = b_x * p_inverse[:, None]
        b_pr += b_u * (b_y * a_inverse[:, None] - near[:, None] * b_u)
        b_uu += b_u * b_u
    part, square = sum_two(b_pr, b_uu)
    cosine = near * square + part
    # A clamped norm makes u shorter than 1. A row of zeros does not have a direction.
    along = tl.where(norm < p_norm, cosine * (p_norm / norm) - near, part)
    along = tl.where(norm == 0.0, 0.0, along)
    return cosine, along, near, p_inverse, a_inverse


@triton.jit
def cosine_grad(b_p, b_a, along, near, p_inverse, a_inverse):
    """Return P · d(-cos)/dp = cos · u - a/|a| = along · u - r.

    P is the clamped norm of p, u = p/P and r = a/|a| - near · u. Unless the norm is clamped, cos =
    near + along.
    """
    b_u = b_p * p_inverse[:, None]
    return along[:, None] * b_u - (b_a * a_inverse[:, None] - near[:, None] * b_u)


@triton.jit
def clamp_min(x, low):
    return tl.where(x < low, low, x)  # A NaN stays a NaN.


@triton.jit
def clamp_one(x):
    return tl.where(x < -1.0, -1.0, tl.where(x > 1.0, 1.0, x))


def row_loss(
    p: Tensor,
    anchor: Tensor,
    losses: Tensor | None,
    *,
    loss: str,
    grad: bool,
    index: Tensor | None = None,
    gather_anchor: bool = False,
    weight: Tensor | None = None,
    gather_weight: bool = False,
    upstream: Tensor | None = None,
    divisor: Tensor | None = None,
    sums: Tensor | None = None,
    first: bool = True,
    count: Tensor | None = None,
    zero_padding: bool = False,
    start: int = 0,
    quantized: Quantized | None = None,
) -> None:
    """Write losses[start + i] = w · ℓ(p[i], a), for the rows i of `p` with start + i < count. With
    `grad` overwrite p by dP = upstream / divisor · w · dℓ/dp, and if `sums` is given store the
    column sums of dP there (`first`) or add them.

    p: (n, Z) contiguous. anchor: (·, Z), any strides and floating dtype; its row is index[start +
    i] if `gather_anchor`, else start + i. weight: the same, (·,) float32; None: 1. losses:
    (capacity,) float32. upstream: (capacity,) or 0-d; None: 1. divisor: 0-d float32; None: 1. sums:
    (S, Z) float32; S programs share the work, and the S rows add up to the sum. count: 0-d int32;
    None: all. zero_padding: dP of rows beyond the count is 0; otherwise these rows are not written.
    quantized: receives the rows of dP in float8.
    """
    n, Z = p.shape
    shape = RowShape.of(Z)
    programs = shape.programs(n) if sums is None else sums.shape[0]
    q, scales = quantized or (None, None)
    with on_device(p):
        row_loss_kernel[(programs,)](
            p,
            anchor,
            weight,
            upstream,
            divisor,
            losses,
            sums,
            q,
            scales,
            index,
            count,
            start,
            n,
            Z,
            *anchor.stride(),
            LOSS=loss,
            GRAD=grad,
            GATHER_ANCHOR=gather_anchor,
            GATHER_WEIGHT=gather_weight and weight is not None,
            UPSTREAM_ROWS=upstream is not None and upstream.dim() == 1,
            SUM=sums is not None,
            FIRST=first and sums is not None,
            COUNT=count is not None,
            ZERO_PADDING=zero_padding,
            WHOLE=shape.whole,
            num_warps=WARPS,
            **shape.constants,
        )
