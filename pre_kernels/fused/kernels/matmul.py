"""Matmuls of a chunk's rows with a weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .common import OPTIONS, cdiv, dot, live_rows, narrow, on_device, widen
from .tiles import halves, swizzle


def input_precision(dtype: torch.dtype) -> str:
    """Return "ieee" unless the user allows tf32 for float32 matmuls. A plain `tl.dot` would use
    tf32 unasked."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


@triton.jit(do_not_specialize=["start", "n"])
def matmul_kernel(
    x_ptr,  # (n, K) by strides
    w_ptr,  # (K, N) by strides
    bias_ptr,  # (N,)
    y_ptr,  # (n, N)
    count_ptr,
    start,
    n,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    i_m, i_n = swizzle(tl.program_id(0), tl.cdiv(n, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    live = live_rows(count_ptr, start, n, COUNT)
    if i_m * BLOCK_M >= live:
        return
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the edge repeat others instead of taking a mask. They are not stored.
    p_x = (  # (M, K)
        x_ptr
        + tl.where(o_m < live, o_m, 0).to(tl.int64)[:, None] * stride_xm
        + o_k[None, :] * stride_xk
    )
    p_w = w_ptr + o_k[:, None] * stride_wk + (o_n % N).to(tl.int64)[None, :] * stride_wn  # (K, N)

    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        b_w = tl.load(p_w, mask=o_k[:, None] < K - k, other=0.0)
        b_x = tl.load(p_x, mask=o_k[None, :] < K - k, other=0.0)
        b_y = dot(b_x, b_w, b_y, w_ptr.dtype.element_ty, PRECISION)
        p_x += BLOCK_K * stride_xk
        p_w += BLOCK_K * stride_wk

    if bias_ptr is not None:
        b_y += widen(tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0))[None, :]
    p_y = y_ptr + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(
        p_y, narrow(b_y, y_ptr.dtype.element_ty), mask=(o_m < live)[:, None] & (o_n < N)[None, :]
    )


@triton.jit(do_not_specialize=["start", "n"])
def matmul_descriptor_kernel(
    x,  # (n, K) in blocks of (BLOCK_M, BLOCK_K)
    w,  # (N, K) in blocks of (BLOCK_N, BLOCK_K), or (K, N) in blocks of (BLOCK_K, BLOCK_N)
    bias_ptr,  # (N,)
    y,  # (n, N) in blocks of (BLOCK_M, BLOCK_N / 2)
    count_ptr,
    start,
    n,
    N,
    K,
    TRANSPOSED: tl.constexpr,  # w is (N, K)
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    live = live_rows(count_ptr, start, n, COUNT)
    tiles_m = tl.cdiv(live, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # The flattened loop loads the next tile during the epilogue of the current one.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        i_m, i_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_k in range(tl.cdiv(K, BLOCK_K)):
            b_x = x.load([i_m * BLOCK_M, i_k * BLOCK_K])
            if TRANSPOSED:
                b_w = w.load([i_n * BLOCK_N, i_k * BLOCK_K]).T
            else:
                b_w = w.load([i_k * BLOCK_K, i_n * BLOCK_N])
            b_y = dot(b_x, b_w, b_y, w.dtype, "ieee")

        # Rows from the count on are computed from whatever x holds there, and stored as far as y
        # reaches. The tile is stored by halves, because a whole tile would take the shared memory
        # of a stage.
        parts = halves(b_y)
        HALF: tl.constexpr = BLOCK_N // 2
        for i in tl.static_range(2):
            b_part = parts[i]
            first = i_n * BLOCK_N + i * HALF
            if bias_ptr is not None:
                o_q = first + tl.arange(0, HALF)
                b_part += widen(tl.load(bias_ptr + o_q, mask=o_q < N, other=0.0))[None, :]
            y.store([i_m * BLOCK_M, first], narrow(b_part, y.dtype))


def matmul(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    count: Tensor | None = None,
    start: int = 0,
    tile: tiles.Tile | None = None,
) -> None:
    """Write y[i] = x[i] · w (+ bias), for the rows i of `y` with start + i < count.

    Args:
        x: (n, K), any strides; its elements are cast to w's dtype.
        w: (K, N), any strides.
        y: (n, N) contiguous. Its rows from the count on are undefined afterwards.
        bias: (N,) or None.
        count: 0-d int32 on the device; None: all.
        tile: None: the tuned one, else the shipped one.

    Where tensor descriptors are possible (see `tiles.descriptor_tile`) the kernel is persistent.
    """
    n = y.shape[0]
    K, N = w.shape
    transposed = w.stride(0) == 1
    w_rows = w.t() if transposed else w
    by_descriptor = tiles.descriptor_tile(x, w_rows, (y,), "rows", n, N)
    with on_device(x):
        if by_descriptor is not None:
            tile = tile or by_descriptor
            matmul_descriptor_kernel[(tiles.programs(tile, n, N, x),)](
                tiles.describe(x, tile.m, tile.k),
                tiles.describe(w_rows, tile.n, tile.k)
                if transposed
                else tiles.describe(w_rows, tile.k, tile.n),
                bias,
                tiles.describe(y, tile.m, tile.n // 2),
                count,
                start,
                n,
                N,
                K,
                TRANSPOSED=transposed,
                COUNT=count is not None,
                **tiles.constants(tile),
                **OPTIONS,
            )
            return
        tile = tile or tiles.pointer_tile(x, w, "rows", n, N)
        matmul_kernel[(cdiv(n, tile.m) * cdiv(N, tile.n),)](
            x,
            w,
            bias,
            y,
            count,
            start,
            n,
            N,
            K,
            *x.stride(),
            *w.stride(),
            COUNT=count is not None,
            PRECISION=input_precision(w.dtype),
            **tiles.constants(tile),
            **OPTIONS,
        )
