"""Weight gradients: a chunk's dYᵀ·X, added to a float32 total."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .common import INTERPRET, OPTIONS, cdiv, dot, live_rows, narrow, on_device
from .matmul import input_precision
from .tiles import quarters, swizzle


@triton.jit(do_not_specialize=["start", "n"])
def weight_grad_kernel(
    dy_ptr,  # (n, M)
    x_ptr,  # (n, N) by strides
    total_ptr,  # (M, N)
    count_ptr,
    start,
    n,
    M,
    N,
    stride_xm,
    stride_xn,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,  # whether to store instead of adding
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    i_m, i_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    live = live_rows(count_ptr, start, n, COUNT)
    if live <= 0 and not FIRST:
        return
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # Columns beyond the edge wrap around instead of taking a mask. They are not stored.
    p_dy = dy_ptr + o_k[None, :] * M + (o_m % M)[:, None]  # (M, K)
    p_x = x_ptr + (o_n % N).to(tl.int64)[None, :] * stride_xn  # (1, N)

    b_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, live, BLOCK_K):
        m_k = o_k < live - k
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
        p_total = total_ptr + base + m * N + o_q
        m_total = (i_m * BLOCK_M + m < M) & (first + o_q < N)
        b_part = parts[i]
        if not FIRST:
            b_part += tl.load(p_total, mask=m_total, other=0.0)
        tl.store(p_total, narrow(b_part, total_ptr.dtype.element_ty), mask=m_total)


@triton.jit(do_not_specialize=["start", "n"])
def weight_grad_descriptor_kernel(
    dy,  # (n, M) in blocks of (BLOCK_K, BLOCK_M)
    x,  # (n, N) in blocks of (BLOCK_K, BLOCK_N)
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
    # This is never negative, because in a flattened loop a negative number of blocks would count as
    # one.
    live = tl.maximum(live_rows(count_ptr, start, n, COUNT), 0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    stop = tiles_m * tiles_n
    if not FIRST:
        stop = tl.where(live > 0, stop, 0)
    # The blocks of rows end at the count, and the first one begins above row 0, where loads give
    # zeros. Whatever lies beyond the count, NaN perhaps, is never read, and no load needs a mask.
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
            elif INTERPRET:  # The interpreter cannot add by descriptor.
                total.store(offsets, total.load(offsets) + parts[i])
            else:
                total.atomic_add(offsets, parts[i])


def add_weight_grad(
    total: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    count: Tensor | None = None,
    start: int = 0,
    first: bool = False,
    tile: tiles.Tile | None = None,
) -> None:
    """Compute total += Σ_i dy[i]ᵀ · x[i], over the rows i of `dy` with start + i < count.

    total: (M, N) contiguous, float32 unless `first`. dy: (n, M) contiguous; its rows from the count
    on may hold anything. x: (n, N), any strides, cast to dy's dtype. count: 0-d int32 on the
    device; None: all. first: store the sum instead of adding it, and zeros if there are no rows.
    tile: as in `matmul`. One program sums each element in a fixed order, so the result is
    deterministic.
    """
    n, M = dy.shape
    N = x.shape[1]
    by_descriptor = tiles.descriptor_tile(x, dy, (total,), "weight", M, N)
    with on_device(x):
        if by_descriptor is not None:
            tile = tile or by_descriptor
            weight_grad_descriptor_kernel[(tiles.programs(tile, M, N, x),)](
                tiles.describe(dy, tile.k, tile.m),
                tiles.describe(x, tile.k, tile.n),
                tiles.describe(total, tile.m, tile.n // 4),
                count,
                start,
                n,
                M,
                N,
                COUNT=count is not None,
                FIRST=first,
                # Triton 3.6 gives each part of a flattened loop's epilogue its own memory on sm100.
                FLATTEN=tiles.arch(x) == "sm90",
                **tiles.constants(tile),
                **OPTIONS,
            )
            return
        tile = tile or tiles.pointer_tile(x, dy, "weight", M, N)
        weight_grad_kernel[(cdiv(M, tile.m) * cdiv(N, tile.n),)](
            dy,
            x,
            total,
            count,
            start,
            n,
            M,
            N,
            *x.stride(),
            COUNT=count is not None,
            FIRST=first,
            PRECISION=input_precision(dy.dtype),
            **tiles.constants(tile),
            **OPTIONS,
        )
