"""Weight gradients: a chunk's dYᵀ·X, added to a float32 total."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, dot, narrow, on_device
from .matmul import GROUP_M, input_precision, quarters, swizzle, tile_for


@triton.jit(do_not_specialize=["start", "n"])
def weight_grad_kernel(
    dy_ptr,  # (n, M)
    x_ptr,  # (·, N), gathered by index
    total_ptr,  # (M, N) float32
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
    FIRST: tl.constexpr,
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

    parts = quarters(b_total, BLOCK_M, BLOCK_N)
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
    """total += Σ_i dy[i]ᵀ · x[index[start + i]], over the rows i of `dy` with start + i < count; = if `first`.

    total: (M, N) contiguous, float32 unless `first`; dy: (n, M) contiguous; x: (·, N), any strides, cast to dy's dtype;
    index, count: as in `matmul`. Each element is summed by one program in a fixed order: deterministic.
    """
    (n, M), N = dy.shape, x.shape[1]
    tile = tile_for(x, dy)
    grid = (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)
    with on_device(x):
        weight_grad_kernel[grid](
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
            COUNT=count is not None,
            FIRST=first,
            PRECISION=input_precision(dy.dtype),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            GROUP_M=GROUP_M,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **OPTIONS,
        )
