"""Row selection: mask → indices and their count, indices → inverse, and the scatter of gradients back to all rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, narrow, on_device, widen

BLOCK = 1024  # rows of the mask of a program
TILE = 2048  # elements of a program of the scatter


@triton.jit(do_not_specialize=["R"])
def count_kernel(mask_ptr, counts_ptr, R, BLOCK: tl.constexpr):
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_mask = tl.load(mask_ptr + o_r, mask=o_r < R, other=0) != 0
    tl.store(counts_ptr + tl.program_id(0), tl.sum(b_mask.to(tl.int32), 0))


@triton.jit(do_not_specialize=["R"])
def select_kernel(mask_ptr, counts_ptr, index_ptr, inverse_ptr, count_ptr, R, BLOCK: tl.constexpr):
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
    tl.store(index_ptr + b_position, o_r, mask=b_mask & m_r)
    tl.store(inverse_ptr + o_r, tl.where(b_mask, b_position, -1), mask=m_r)
    if pid == tl.num_programs(0) - 1:
        tl.store(count_ptr, offset + tl.sum(b_mask.to(tl.int32), 0))


@triton.jit(do_not_specialize=["N"])
def invert_kernel(index_ptr, inverse_ptr, N, BLOCK: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_row = tl.load(index_ptr + o_n, mask=o_n < N, other=0).to(tl.int64)
    tl.store(inverse_ptr + b_row, o_n, mask=o_n < N)


@triton.jit(do_not_specialize=["R"])
def scatter_kernel(
    x_ptr,  # (capacity, D)
    out_ptr,  # (R, D)
    inverse_ptr,  # (R,)
    scale_ptr,  # 0-d float32
    R,
    D,
    INVERSE: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < R
    sources = o_r.to(tl.int64)
    if INVERSE:
        sources = tl.load(inverse_ptr + o_r, mask=m_r, other=-1).to(tl.int64)
    scale = 1.0
    if SCALE:
        scale = tl.load(scale_ptr)
    o_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_out = m_r[:, None] & (o_d < D)[None, :]
    live = m_out & (sources >= 0)[:, None]
    b_x = widen(tl.load(x_ptr + sources[:, None] * D + o_d[None, :], mask=live, other=0.0))
    b_x = tl.where(live, b_x * scale, 0.0)  # not scale · 0: an infinite or NaN scale must not reach other rows
    p_out = out_ptr + o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out, narrow(b_x, out_ptr.dtype.element_ty), mask=m_out)


def select(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a (R,) bool mask: (R,) int32 indices of its true rows in order, zero from the count on; their (R,) int32
    inverse, -1 where false; and the 0-d int32 count. Reads nothing back to the host."""
    R = mask.numel()
    index = mask.new_zeros(R, dtype=torch.int32)  # zeros: what lies beyond the count is read by gathers of weights
    inverse = torch.empty_like(index)
    count = mask.new_zeros((), dtype=torch.int32)
    if R:
        blocks = triton.cdiv(R, BLOCK)
        counts = index.new_empty(blocks)
        with on_device(mask):
            count_kernel[(blocks,)](mask, counts, R, BLOCK=BLOCK, num_warps=4, **OPTIONS)
            select_kernel[(blocks,)](mask, counts, index, inverse, count, R, BLOCK=BLOCK, num_warps=4, **OPTIONS)
    return index, inverse, count


def invert(index: Tensor, total: int) -> Tensor:
    """(total,) int32: the position in `index` (N,) of each row, -1 where it has none."""
    inverse = index.new_full((total,), -1, dtype=torch.int32)
    if index.numel():
        with on_device(index):
            invert_kernel[(triton.cdiv(index.numel(), BLOCK),)](
                index, inverse, index.numel(), BLOCK=BLOCK, num_warps=4, **OPTIONS
            )
    return inverse


def scatter(x: Tensor, out: Tensor, *, inverse: Tensor | None = None, scale: Tensor | None = None) -> None:
    """out[r] = scale · x[inverse[r]], 0 where inverse[r] is -1. x: (capacity, D), out: (R, D), both contiguous, any
    floating dtypes; inverse: (R,), None = the identity; scale: 0-d float32, None = 1."""
    R, D = out.shape
    if not R:
        return
    columns = min(TILE, triton.next_power_of_2(D))
    rows = TILE // columns
    with on_device(x):
        scatter_kernel[triton.cdiv(R, rows), triton.cdiv(D, columns)](
            x,
            out,
            inverse,
            scale,
            R,
            D,
            INVERSE=inverse is not None,
            SCALE=scale is not None,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
            **OPTIONS,
        )
