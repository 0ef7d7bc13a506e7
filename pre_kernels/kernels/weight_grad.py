"""Weight gradients: a chunk's dYᵀ·X and column sums of dY, added to float32 totals."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import INTERPRET, OPTIONS, dot, narrow, on_device, widen
from .matmul import input_precision
from .tiles import quarters, swizzle

COLUMNS, ROWS, SPLITS = 128, 32, 16  # of a column sum: a program's tile, and how many programs share a column


@triton.jit(do_not_specialize=["start", "n"])
def weight_grad_kernel(
    dy_ptr,  # (n, M)
    x_ptr,  # (·, N), gathered by index
    total_ptr,  # (M, N)
    index_ptr,  # (capacity,)
    count_ptr,
    start,
    n,
    M,
    N,
    stride_xm,
    stride_xn,
    GATHER: tl.constexpr,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,  # store instead of adding
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    i_m, i_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    live = n
    if COUNT:
        live = tl.minimum(n, tl.load(count_ptr) - start)
    if live <= 0 and not FIRST:
        return
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # columns beyond the edge wrap around instead of taking a mask; they are not stored
    p_dy = dy_ptr + o_k[None, :] * M + (o_m % M)[:, None]  # (M, K)
    p_x = x_ptr + (o_n % N)[None, :] * stride_xn  # (1, N)

    b_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, live, BLOCK_K):
        m_k = o_k < live - k
        if GATHER:
            rows = tl.load(index_ptr + start + k + o_k, mask=m_k, other=0).to(tl.int64)
        else:
            rows = (k + o_k).to(tl.int64)
        b_dy = tl.load(p_dy, mask=m_k[None, :], other=0.0)
        b_x = tl.load(p_x + rows[:, None] * stride_xm, mask=m_k[:, None], other=0.0)  # (K, N)
        b_total = dot(b_dy, b_x, b_total, dy_ptr.dtype.element_ty, PRECISION)
        p_dy += BLOCK_K * M

    parts = quarters(b_total)
    QUARTER: tl.constexpr = BLOCK_N // 4
    m = tl.arange(0, BLOCK_M)[:, None]
    for i in tl.static_range(4):
        first = i_n * BLOCK_N + i * QUARTER
        base = (i_m * BLOCK_M).to(tl.int64) * N + first
        o_q = tl.arange(0, QUARTER)[None, :]
        p_total, m_total = total_ptr + base + m * N + o_q, (i_m * BLOCK_M + m < M) & (first + o_q < N)
        b_part = parts[i]
        if not FIRST:
            b_part += tl.load(p_total, mask=m_total, other=0.0)
        tl.store(p_total, narrow(b_part, total_ptr.dtype.element_ty), mask=m_total)


@triton.jit(do_not_specialize=["start", "n"])
def weight_grad_descriptor_kernel(
    dy,  # (n, M) in blocks of (BLOCK_K, BLOCK_M)
    x,  # (·, N) in blocks of (BLOCK_K, BLOCK_N)
    total,  # (M, N) in blocks of (BLOCK_M, BLOCK_N / 4)
    count_ptr,
    start,
    n,
    M,
    N,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    live = n
    if COUNT:  # never negative: flattened, a negative number of blocks would be taken for one
        live = tl.maximum(tl.minimum(n, tl.load(count_ptr) - start), 0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    stop = tiles_m * tiles_n
    if not FIRST:
        stop = tl.where(live > 0, stop, 0)
    # The blocks of rows end at the count, and the first one begins above row 0, where loads give zeros: what lies
    # beyond the count, NaN perhaps, is never read, and nothing needs a mask.
    blocks = tl.cdiv(live, BLOCK_K)
    top = live - blocks * BLOCK_K
    for tile in tl.range(tl.program_id(0), stop, tl.num_programs(0), flatten=FLATTEN):
        i_m, i_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        b_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_k in range(blocks):
            b_dy = dy.load([top + i_k * BLOCK_K, i_m * BLOCK_M])
            b_x = x.load([top + i_k * BLOCK_K, i_n * BLOCK_N])
            b_total = dot(b_dy.T, b_x, b_total, dy.dtype, "ieee")

        parts = quarters(b_total)
        for i in tl.static_range(4):
            offsets = [i_m * BLOCK_M, i_n * BLOCK_N + i * (BLOCK_N // 4)]
            if FIRST:
                total.store(offsets, narrow(parts[i], total.dtype))
            elif INTERPRET:  # which has no additions by descriptor
                total.store(offsets, total.load(offsets) + parts[i])
            else:
                total.atomic_add(offsets, parts[i])


@triton.jit(do_not_specialize=["start", "n"])
def column_sum_kernel(
    y_ptr,  # (n, M)
    sums_ptr,  # (programs along axis 1, M) float32
    count_ptr,
    start,
    n,
    M,
    COUNT: tl.constexpr,
    ADD: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_m, i_s, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    live = n
    if COUNT:
        live = tl.minimum(n, tl.load(count_ptr) - start)
    o_m = i_m * COLUMNS + tl.arange(0, COLUMNS)
    m_m = o_m < M
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(i_s * ROWS, live, splits * ROWS):
        o_n = first + tl.arange(0, ROWS)
        p_y = y_ptr + o_n.to(tl.int64)[:, None] * M + o_m[None, :]
        b_sum += widen(tl.load(p_y, mask=(o_n < live)[:, None] & m_m[None, :], other=0.0))
    b_total = tl.sum(b_sum, 0)
    p_sums = sums_ptr + i_s * M + o_m
    if ADD:
        b_total += tl.load(p_sums, mask=m_m, other=0.0)
    tl.store(p_sums, b_total, mask=m_m)


def add_weight_grad(
    total: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    index: Tensor | None = None,
    count: Tensor | None = None,
    start: int = 0,
    first: bool = False,
) -> None:
    """total += Σ_i dy[i]ᵀ · x[index[start + i]], over the rows i of `dy` with start + i < count.

    total: (M, N) contiguous, float32 unless `first`; dy: (n, M) contiguous; x: (·, N), any strides, cast to dy's dtype;
    index, count: as in `matmul`; first: total = instead of total +=, zeros where there is no row. Each element is
    summed by one program in a fixed order: deterministic. Rows from the count on may hold anything.
    """
    (n, M), N = dy.shape, x.shape[1]
    tile = tiles.descriptor_tile(x, dy, (total,), M, N) if index is None else None
    shared = {"COUNT": count is not None, "FIRST": first, **OPTIONS}
    with on_device(x):
        if tile is not None:
            weight_grad_descriptor_kernel[(tiles.programs(tile, M, N, x),)](
                tiles.describe(dy, tile.k, tile.m),
                tiles.describe(x, tile.k, tile.n),
                tiles.describe(total, tile.m, tile.n // 4),
                count,
                start,
                n,
                M,
                N,
                # flattened on sm100, triton 3.6 gives each part of the epilogue memory of its own
                FLATTEN=tiles.arch(x) == "sm90",
                **tiles.constants(tile),
                num_stages=tile.stages,
                **shared,
            )
            return
        tile = tiles.pointer_tile(x, dy, M, N)
        weight_grad_kernel[(triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)](
            dy,
            x,
            total,
            index,
            count,
            start,
            n,
            M,
            N,
            *x.stride(),
            GATHER=index is not None,
            PRECISION=input_precision(dy.dtype),
            **tiles.constants(tile),
            num_stages=tile.stages,
            **shared,
        )


def add_column_sum(total: Tensor, y: Tensor, *, count: Tensor | None = None, start: int = 0) -> None:
    """total += Σ_i y[i], over the rows i of `y` with start + i < count; total: (M,) float32, y: (n, M) contiguous.

    In two launches, so that many programs read and the sum is still deterministic.
    """
    n, M = y.shape
    splits = min(SPLITS, triton.cdiv(n, ROWS))
    sums = total.new_empty(splits, M)
    columns = triton.cdiv(M, COLUMNS)
    shape = {"COLUMNS": COLUMNS, "ROWS": ROWS, "num_warps": 4, **OPTIONS}
    with on_device(y):
        column_sum_kernel[columns, splits](y, sums, count, start, n, M, COUNT=count is not None, ADD=False, **shape)
        column_sum_kernel[columns, 1](sums, total, None, 0, splits, M, COUNT=False, ADD=True, **shape)
