"""The norm of rows: what its forward needs, and its backward in the pass that scatters dH."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    WARPS,
    RowShape,
    add_column_sum,
    cdiv,
    columns_of,
    load_columns,
    narrow,
    on_device,
    sum_two,
    widen,
)


@triton.jit
def moments(
    b_x,
    p_x,
    D,
    stride_xd,
    m_n,
    o_b,
    eps,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the mean of each row (0 except for a layer norm) and 1 / std; for NORM "unit" 1 / |x|,
    where |x| is clamped at eps. p_x: pointers to the rows' columns o_b. If a row fits one block
    (`WHOLE`), b_x holds it, and the compiler removes the loops."""
    stop = BLOCK if WHOLE else D
    inverse_width = tl.div_rn(1.0, D * 1.0)
    mean = tl.zeros(m_n.shape, tl.float32)
    if NORM == "layer":
        for d in range(0, stop, BLOCK):
            mean += tl.sum(columns_of(b_x, p_x, d, D, stride_xd, m_n, o_b, WHOLE), 1)
        mean *= inverse_width
    elif NORM != "rms" and NORM != "unit":
        tl.static_assert(False, "moments: no branch for this NORM")
    square = tl.zeros(m_n.shape, tl.float32)
    for d in range(0, stop, BLOCK):
        b_y = columns_of(b_x, p_x, d, D, stride_xd, m_n, o_b, WHOLE)
        if NORM == "layer":
            b_y = tl.where((d + o_b < D)[None, :], b_y - mean[:, None], 0.0)
        square += tl.sum(b_y * b_y, 1)
    if NORM == "unit":
        length = tl.sqrt_rn(square)
        return mean, tl.div_rn(1.0, tl.where(length < eps, eps, length))
    return mean, tl.div_rn(1.0, tl.sqrt_rn(square * inverse_width + eps))


@triton.jit
def affine(b_x, weight_ptr, bias_ptr, o_d, D):
    """Return weight · x + bias for the columns o_d of rows; a None is 1 or 0."""
    if weight_ptr is not None:
        b_x *= widen(tl.load(weight_ptr + o_d, mask=o_d < D, other=0.0))[None, :]
    if bias_ptr is not None:
        b_x += widen(tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0))[None, :]
    return b_x


@triton.jit(do_not_specialize=["R"])
def scatter_norm_kernel(
    x_ptr,  # (capacity, D): gradients of the normalised rows
    hidden_ptr,  # (R, D) by strides
    weight_ptr,  # (D,)
    out_ptr,  # (R, D)
    sums_ptr,  # (2, programs, D) float32
    inverse_ptr,  # (R,)
    upstream_ptr,  # 0-d
    R,
    D,
    stride_hm,
    stride_hd,
    eps,
    NORM: tl.constexpr,
    INVERSE: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = 1.0
    if upstream_ptr is not None:
        scale = widen(tl.load(upstream_ptr))
    inverse_width = tl.div_rn(1.0, D * 1.0)
    o_b = tl.arange(0, BLOCK)
    stop = BLOCK if WHOLE else D
    b_nothing = tl.zeros((ROWS, BLOCK), tl.float32)
    b_weight_sum, b_bias_sum = b_nothing, b_nothing
    if not WHOLE:
        for d in range(0, D, BLOCK):
            add_sums(sums_ptr, d, b_nothing, b_nothing, o_b, D, True)
    for first in range(tl.program_id(0) * ROWS, R, tl.num_programs(0) * ROWS):
        if not WHOLE and sums_ptr is not None:
            # The thread that stores a sum may not be the one that loads it for the next row.
            tl.debug_barrier()
        o_r = first + tl.arange(0, ROWS)
        m_r = o_r < R
        sources = o_r.to(tl.int64)
        if INVERSE:
            sources = tl.load(inverse_ptr + o_r, mask=m_r, other=-1).to(tl.int64)
        live = m_r & (sources >= 0)
        p_x = x_ptr + sources[:, None] * D + o_b[None, :]
        p_h = hidden_ptr + o_r.to(tl.int64)[:, None] * stride_hm
        p_h += o_b.to(tl.int64)[None, :] * stride_hd
        b_x, b_h = None, None
        if WHOLE:
            b_x = load_columns(p_x, 0, D, 1, live, o_b)
            b_h = load_columns(p_h, 0, D, stride_hd, live, o_b)
        mean, inverse = moments(b_h, p_h, D, stride_hd, live, o_b, eps, NORM, WHOLE, BLOCK)
        # Rows that take no part are zeros, whose 1 / std is infinite where eps is 0.
        inverse = tl.where(live, inverse, 0.0)

        b_dot, b_sum = b_nothing, b_nothing
        for d in range(0, stop, BLOCK):
            b_dy = columns_of(b_x, p_x, d, D, 1, live, o_b, WHOLE)
            b_y = columns_of(b_h, p_h, d, D, stride_hd, live, o_b, WHOLE)
            b_y = (b_y - mean[:, None]) * inverse[:, None]
            if WHOLE:
                b_weight_sum += b_dy * b_y
                b_bias_sum += b_dy
            else:
                add_sums(sums_ptr, d, b_dy * b_y, b_dy, o_b, D, False)
            b_dx = affine(b_dy, weight_ptr, None, d + o_b, D)
            b_dot += b_dx * b_y
            b_sum += b_dx
        dot, average = sum_two(b_dot, b_sum)
        if NORM == "unit":
            # Where the length was clamped, it is a constant.
            dot = tl.where(inverse < tl.div_rn(1.0, eps), dot, 0.0)
        else:
            dot *= inverse_width
        # Only a layer norm subtracts the mean.
        average = average * inverse_width if NORM == "layer" else average * 0.0
        if out_ptr is not None:
            p_out = out_ptr + o_r.to(tl.int64)[:, None] * D + o_b[None, :]
            for d in range(0, stop, BLOCK):
                b_dx = columns_of(b_x, p_x, d, D, 1, live, o_b, WHOLE)
                b_dx = affine(b_dx, weight_ptr, None, d + o_b, D)
                b_y = columns_of(b_h, p_h, d, D, stride_hd, live, o_b, WHOLE)
                b_y = (b_y - mean[:, None]) * inverse[:, None]
                b_dh = b_dx - average[:, None] - b_y * dot[:, None]
                b_dh *= (inverse * scale)[:, None]
                # An infinite or NaN scale must not reach the unselected rows.
                b_dh = tl.where(live[:, None], b_dh, 0.0)
                mask = m_r[:, None] & (d + o_b < D)[None, :]
                tl.store(p_out + d, narrow(b_dh, out_ptr.dtype.element_ty), mask=mask)
    if WHOLE:
        add_sums(sums_ptr, 0, b_weight_sum, b_bias_sum, o_b, D, True)


@triton.jit
def add_sums(sums_ptr, d, b_weight, b_bias, o_b, D, FIRST: tl.constexpr):
    """Add the column sums for the columns d + o_b of scale and shift."""
    if sums_ptr is not None:
        add_column_sum(sums_ptr + d, b_weight, o_b, D, D - d, FIRST)
        sums_ptr += tl.num_programs(0) * D
        add_column_sum(sums_ptr + d, b_bias, o_b, D, D - d, FIRST)


def scatter_norm(
    x: Tensor,
    hidden: Tensor,
    out: Tensor | None,
    *,
    norm: str,
    eps: float,
    weight: Tensor | None = None,
    sums: Tensor | None = None,
    inverse: Tensor | None = None,
    upstream: Tensor | None = None,
) -> None:
    """Write out[r] = upstream · the gradient of hidden[r] from x[inverse[r]], that of its norm, or
    0 where inverse[r] is -1. Store the gradients of the norm's scale and shift for an upstream of 1
    in `sums`.

    x: (capacity, D) and out: (R, D), both contiguous. hidden: (R, D), any strides. All in any
    floating dtypes. norm: "layer", "rms", or "unit", rows of length 1. weight: the norm's scale,
    (D,) contiguous; None: 1. sums: (2, S, D) float32; S programs share the work, and S rows add up
    to a gradient. inverse: (R,); None: the identity, and `out` may be `x` or `hidden`. upstream:
    0-d; None: 1. An `out` or `sums` of None is not computed.
    """
    R, D = hidden.shape
    shape = RowShape.of(D)
    programs = cdiv(R, shape.rows) if sums is None else sums.shape[1]
    if not programs:
        return
    with on_device(x):
        scatter_norm_kernel[(programs,)](
            x,
            hidden,
            weight,
            out,
            sums,
            inverse,
            upstream,
            R,
            D,
            *hidden.stride(),
            eps,
            NORM=norm,
            INVERSE=inverse is not None,
            WHOLE=shape.whole,
            num_warps=WARPS,
            **shape.constants,
        )
