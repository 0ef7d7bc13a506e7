"""Select rows (mask → indices and count, indices → inverse), gather them, and scatter gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, WARPS, RowShape, cdiv, live_rows, narrow, on_device, power_of_2, widen
from .norm import affine, moments
from .quantize import Quantized, store_quantized

BLOCK = 1024  # One program counts or selects this many rows of a mask.
TILE = 2048  # One program of the scatter writes this many elements.


@triton.jit(do_not_specialize=["R"])
def count_kernel(mask_ptr, counts_ptr, R, BLOCK: tl.constexpr):
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_mask = tl.load(mask_ptr + o_r, mask=o_r < R, other=0) != 0
    tl.store(counts_ptr + tl.program_id(0), tl.sum(b_mask.to(tl.int32), 0))


@triton.jit(do_not_specialize=["R", "capacity"])
def select_kernel(
    mask_ptr, counts_ptr, index_ptr, inverse_ptr, count_ptr, R, capacity, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, pid, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        before += tl.load(counts_ptr + o_b, mask=o_b < pid, other=0)
    offset = tl.sum(before, 0)

    o_r = pid * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < R
    b_mask = tl.load(mask_ptr + o_r, mask=m_r, other=0) != 0
    b_position = offset + tl.cumsum(b_mask.to(tl.int32), 0) - 1
    b_kept = b_mask & (b_position < capacity)
    tl.store(index_ptr + b_position, o_r, mask=b_kept & m_r)
    tl.store(inverse_ptr + o_r, tl.where(b_kept, b_position, -1), mask=m_r)
    if pid == tl.num_programs(0) - 1:
        tl.store(count_ptr, offset + tl.sum(b_mask.to(tl.int32), 0))


@triton.jit(do_not_specialize=["N"])
def invert_kernel(index_ptr, inverse_ptr, N, BLOCK: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_row = tl.load(index_ptr + o_n, mask=o_n < N, other=0).to(tl.int64)
    tl.store(inverse_ptr + b_row, o_n, mask=o_n < N)


@triton.jit(do_not_specialize=["start", "n"])
def gather_kernel(
    x_ptr,  # (·, D) by strides
    out_ptr,  # (n, D)
    q_ptr,  # (n, D) float8
    scales_ptr,  # (n,)
    index_ptr,  # (capacity,)
    count_ptr,
    weight_ptr,  # (D,), of the norm
    bias_ptr,
    start,
    n,
    D,
    stride_xm,
    stride_xd,
    eps,
    NORM: tl.constexpr,
    GATHER: tl.constexpr,
    COUNT: tl.constexpr,
    ZERO_PADDING: tl.constexpr,  # rows beyond the count become 0
    WHOLE: tl.constexpr,  # a row fits one block
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    live = live_rows(count_ptr, start, n, COUNT)
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if GATHER:
        rows = tl.load(index_ptr + start + o_n, mask=o_n < live, other=0).to(tl.int64)
    else:
        rows = (start + o_n).to(tl.int64)
    last = n if ZERO_PADDING else live
    m_x = (o_n < live)[:, None] & (o_d < D)[None, :]
    p_x = x_ptr + rows[:, None] * stride_xm + o_d.to(tl.int64)[None, :] * stride_xd
    b_x = widen(tl.load(p_x, mask=m_x, other=0.0))
    if NORM is not None:
        # Each program of a long row reads all of it.
        o_b = tl.arange(0, BLOCK)
        p_row = x_ptr + rows[:, None] * stride_xm + o_b.to(tl.int64)[None, :] * stride_xd
        mean, inverse = moments(b_x, p_row, D, stride_xd, o_n < live, o_b, eps, NORM, WHOLE, BLOCK)
        b_x = affine((b_x - mean[:, None]) * inverse[:, None], weight_ptr, bias_ptr, o_d, D)
        b_x = tl.where(m_x, b_x, 0.0)
    if out_ptr is not None:
        p_out = out_ptr + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(
            p_out,
            narrow(b_x, out_ptr.dtype.element_ty),
            mask=(o_n < last)[:, None] & (o_d < D)[None, :],
        )
    if q_ptr is not None:
        store_quantized(q_ptr, scales_ptr, b_x, o_n, o_d, last, D)


@triton.jit(do_not_specialize=["R"])
def scatter_kernel(
    x_ptr,  # (capacity, D)
    out_ptr,  # (R, D)
    inverse_ptr,  # (R,)
    upstream_ptr,  # 0-d
    R,
    D,
    INVERSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    scale = load_scale(upstream_ptr, None)
    if IN_PLACE and scale == 1.0:
        return
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < R
    sources = o_r.to(tl.int64)
    if INVERSE:
        sources = tl.load(inverse_ptr + o_r, mask=m_r, other=-1).to(tl.int64)
    o_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_out = m_r[:, None] & (o_d < D)[None, :]
    live = m_out & (sources >= 0)[:, None]
    b_x = widen(tl.load(x_ptr + sources[:, None] * D + o_d[None, :], mask=live, other=0.0))
    # This chooses instead of multiplying by 0, because an infinite or NaN scale must not reach the
    # other rows.
    b_x = tl.where(live, b_x * scale, 0.0)
    p_out = out_ptr + o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out, narrow(b_x, out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def load_scale(upstream_ptr, divisor_ptr):
    """Return upstream ÷ divisor, each 1 where it is None."""
    scale = 1.0
    if upstream_ptr is not None:
        scale = widen(tl.load(upstream_ptr))
    if divisor_ptr is not None:
        scale = scale / tl.load(divisor_ptr)
    return scale


def select(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return index, inverse and count of a (R,) bool mask with R > 0, without reading anything back
    to the host.

    index: (capacity,) int32, the first true rows in order, undefined from the count on. inverse:
    (R,) int32, the position of each row in the index, or -1. count: 0-d int32, which may exceed the
    capacity.
    """
    R = mask.numel()
    blocks = cdiv(R, BLOCK)
    index, inverse, count, counts = (
        mask.new_empty(shape, dtype=torch.int32) for shape in ((capacity,), (R,), (), (blocks,))
    )
    shape = {"BLOCK": BLOCK, "num_warps": 4, **OPTIONS}
    with on_device(mask):
        count_kernel[(blocks,)](mask, counts, R, **shape)
        select_kernel[(blocks,)](mask, counts, index, inverse, count, R, capacity, **shape)
    return index, inverse, count


def invert(index: Tensor, total: int) -> Tensor:
    """Return the position in `index` (N,) of each row, or -1: (total,) int32."""
    inverse = index.new_full((total,), -1, dtype=torch.int32)
    if index.numel():
        with on_device(index):
            invert_kernel[(cdiv(index.numel(), BLOCK),)](
                index, inverse, index.numel(), BLOCK=BLOCK, num_warps=4, **OPTIONS
            )
    return inverse


def gather(
    x: Tensor,
    out: Tensor | None,
    *,
    index: Tensor | None = None,
    count: Tensor | None = None,
    zero_padding: bool = False,
    start: int = 0,
    quantized: Quantized | None = None,
    norm: str | None = None,
    eps: float = 0.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Write out[i] = x[index[start + i]] in out's dtype, for the rows i of `out` with start + i <
    count.

    x: (·, D), any strides. out: (n, D) contiguous. index: (capacity,); None: row start + i. count:
    0-d int32; None: all. zero_padding: rows from the count on are 0; otherwise they are not
    written. quantized: receives the same rows in float8. norm: "layer" or "rms" normalises the
    rows, and `eps` is added to their variance; "unit" makes their length 1, clamped at `eps`.
    weight, bias: scale and shift of the norm, (D,) contiguous; None: 1 and 0.
    """
    q, scales = quantized or (None, None)
    n, D = next(rows for rows in (out, q) if rows is not None).shape
    shape = RowShape.of(D)
    with on_device(x):
        gather_kernel[cdiv(n, shape.rows), cdiv(D, shape.block)](
            x,
            out,
            q,
            scales,
            index,
            count,
            weight,
            bias,
            start,
            n,
            D,
            *x.stride(),
            eps,
            NORM=norm,
            GATHER=index is not None,
            COUNT=count is not None,
            ZERO_PADDING=zero_padding,
            WHOLE=shape.whole,
            num_warps=WARPS,
            **shape.constants,
        )


def scatter(
    x: Tensor,
    out: Tensor,
    *,
    inverse: Tensor | None = None,
    upstream: Tensor | None = None,
) -> None:
    """Write out[r] = upstream · x[inverse[r]], or 0 where inverse[r] is -1.

    x: (capacity, D) and out: (R, D), both contiguous, in any floating dtypes. inverse: (R,); None:
    the identity. upstream: 0-d; None: 1. Without an inverse `out` may be `x`, which is then read
    and written only if upstream is not 1.
    """
    R, D = out.shape
    if not R:
        return
    columns = min(TILE, power_of_2(D))
    rows = TILE // columns
    with on_device(x):
        scatter_kernel[cdiv(R, rows), cdiv(D, columns)](
            x,
            out,
            inverse,
            upstream,
            R,
            D,
            INVERSE=inverse is not None,
            IN_PLACE=out is x,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
            **OPTIONS,
        )
