"""The norm of rows: what its forward needs, and its backward in the pass that scatters dH."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, WARPS, RowShape, cdiv, narrow, on_device, sum_two, widen


@triton.jit
def load_columns(p_x, d, D, stride_xd, m_n, o_b):
    """Return the columns d + o_b of rows, in float32."""
    mask = m_n[:, None] & (d + o_b < D)[None, :]
    return widen(tl.load(p_x + tl.cast(d, tl.int64) * stride_xd, mask=mask, other=0.0))


@triton.jit
def columns_of(b_x, p_x, d, D, stride_xd, m_n, o_b, WHOLE: tl.constexpr):
    """Return the same columns; if a row fits one block, b_x holds them already."""
    if WHOLE:
        return b_x
    return load_columns(p_x, d, D, stride_xd, m_n, o_b)


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


@triton.jit(do_not_specialize=["R"])
def scatter_norm_kernel(
    x_ptr,  # (capacity, D): gradients of the normalised rows
    hidden_ptr,  # (R, D) by strides
    out_ptr,  # (R, D)
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
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_b = tl.arange(0, BLOCK)
    m_r = o_r < R
    sources = o_r.to(tl.int64)
    if INVERSE:
        sources = tl.load(inverse_ptr + o_r, mask=m_r, other=-1).to(tl.int64)
    live = m_r & (sources >= 0)
    p_x = x_ptr + sources[:, None] * D + o_b[None, :]
    p_h = hidden_ptr + o_r.to(tl.int64)[:, None] * stride_hm
    p_h += o_b.to(tl.int64)[None, :] * stride_hd
    p_out = out_ptr + o_r.to(tl.int64)[:, None] * D + o_b[None, :]
    b_x, b_h = None, None
    if WHOLE:
        b_x = load_columns(p_x, 0, D, 1, live, o_b)
        b_h = load_columns(p_h, 0, D, stride_hd, live, o_b)
    mean, inverse = moments(b_h, p_h, D, stride_hd, live, o_b, eps, NORM, WHOLE, BLOCK)

    stop = BLOCK if WHOLE else D
    b_dot, b_sum = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for d in range(0, stop, BLOCK):
        b_dx = columns_of(b_x, p_x, d, D, 1, live, o_b, WHOLE)
        b_y = columns_of(b_h, p_h, d, D, stride_hd, live, o_b, WHOLE)
        b_y = (b_y - mean[:, None]) * inverse[:, None]
        b_dot += b_dx * b_y
        b_sum += b_dx
    inverse_width = tl.div_rn(1.0, D * 1.0)
    dot, average = sum_two(b_dot, b_sum)
    if NORM == "unit":
        # Where the length was clamped, it is a constant.
        dot = tl.where(inverse < tl.div_rn(1.0, eps), dot, 0.0)
    else:
        dot *= inverse_width
    # Only a layer norm subtracts the mean.
    average = average * inverse_width if NORM == "layer" else average * 0.0
    for d in range(0, stop, BLOCK):
        b_dx = columns_of(b_x, p_x, d, D, 1, live, o_b, WHOLE)
        b_y = columns_of(b_h, p_h, d, D, stride_hd, live, o_b, WHOLE)
        b_y = (b_y - mean[:, None]) * inverse[:, None]
        b_dh = (b_dx - average[:, None] - b_y * dot[:, None]) * (inverse * scale)[:, None]
        # An infinite or NaN scale must not reach the unselected rows.
        b_dh = tl.where(live[:, None], b_dh, 0.0)
        mask = m_r[:, None] & (d + o_b < D)[None, :]
        tl.store(p_out + d, narrow(b_dh, out_ptr.dtype.element_ty), mask=mask)


def scatter_norm(
    x: Tensor,
    hidden: Tensor,
    out: Tensor,
    *,
    norm: str,
    eps: float,
    inverse: Tensor | None = None,
    upstream: Tensor | None = None,
) -> None:
    """Write out[r] = upstream · the gradient of hidden[r] from x[inverse[r]], that of its norm, or
    0 where inverse[r] is -1.

    x: (capacity, D) and out: (R, D), both contiguous. hidden: (R, D), any strides. All in any
    floating dtypes. norm: "layer", "rms", or "unit", rows of length 1. inverse: (R,); None: the
    identity, and `out` may be `x` or `hidden`. upstream: 0-d; None: 1.
    """
    R, D = out.shape
    if not R:
        return
    shape = RowShape.of(D)
    with on_device(x):
        scatter_norm_kernel[(cdiv(R, shape.rows),)](
            x,
            hidden,
            out,
            inverse,
            upstream,
            R,
            D,
            *hidden.stride(),
            eps,
            NORM=norm,
            INVERSE=inverse is not None,
            WHOLE=shape.block >= D,
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=WARPS,
            **OPTIONS,
        )
