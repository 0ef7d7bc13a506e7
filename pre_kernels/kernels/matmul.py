"""Products of a chunk's rows with a weight: gather in the prologue, bias and activation in the epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .activation import activate, activate_grad
from .launch import OPTIONS, dot, narrow, on_device, widen
from .tiles import halves, quarters, swizzle


def input_precision(dtype: torch.dtype) -> str:
    """ "ieee" unless the user let float32 products be tf32; a plain `tl.dot` would be tf32 without asking."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


@triton.jit(do_not_specialize=["start", "n"])
def matmul_kernel(
    x_ptr,  # (·, K), gathered by index
    w_ptr,  # (K, N) by strides
    bias_ptr,  # (N,)
    y_ptr,  # (n, N)
    aux_ptr,  # (n, N): act(Y) written, or Z read
    index_ptr,  # (capacity,)
    count_ptr,
    start,
    n,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    GATHER: tl.constexpr,
    COUNT: tl.constexpr,
    BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,  # "none" | "activate": aux = act(Y) | "activate_grad": Y *= act'(aux)
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    i_m, i_n = swizzle(tl.program_id(0), tl.cdiv(n, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    live = n
    if COUNT:
        live = tl.minimum(n, tl.load(count_ptr) - start)
    if i_m * BLOCK_M >= live:
        return
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # rows and columns beyond the edge repeat others instead of taking a mask; they are not stored
    if GATHER:
        rows = tl.load(index_ptr + start + o_m, mask=o_m < live, other=0).to(tl.int64)
    else:
        rows = tl.where(o_m < live, o_m, 0).to(tl.int64)
    p_x = x_ptr + rows[:, None] * stride_xm + o_k[None, :] * stride_xk  # (M, K)
    p_w = w_ptr + o_k[:, None] * stride_wk + (o_n % N)[None, :] * stride_wn  # (K, N)

    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        b_w = tl.load(p_w, mask=o_k[:, None] < K - k, other=0.0)
        b_x = tl.load(p_x, mask=o_k[None, :] < K - k, other=0.0)
        b_y = dot(b_x, b_w, b_y, w_ptr.dtype.element_ty, PRECISION)
        p_x += BLOCK_K * stride_xk
        p_w += BLOCK_K * stride_wk

    # a quarter of the columns at a time, on a 64-bit base with 32-bit offsets: an activation of the whole tile would
    # leave the accumulators no registers
    parts = quarters(b_y)
    QUARTER: tl.constexpr = BLOCK_N // 4
    m = tl.arange(0, BLOCK_M)[:, None]
    for i in tl.static_range(4):
        b_part = parts[i]
        first = i_n * BLOCK_N + i * QUARTER
        base = (i_m * BLOCK_M).to(tl.int64) * N + first
        o_q = tl.arange(0, QUARTER)[None, :]
        o_y, m_y = m * N + o_q, (i_m * BLOCK_M + m < live) & (first + o_q < N)
        if BIAS:
            b_part += widen(tl.load(bias_ptr + first + o_q, mask=first + o_q < N, other=0.0))
        if EPILOGUE == "activate_grad":
            b_part *= activate_grad(widen(tl.load(aux_ptr + base + o_y, mask=m_y, other=0.0)), ACTIVATION)
        tl.store(y_ptr + base + o_y, narrow(b_part, y_ptr.dtype.element_ty), mask=m_y)
        if EPILOGUE == "activate":
            b_part = activate(b_part, ACTIVATION)
            tl.store(aux_ptr + base + o_y, narrow(b_part, aux_ptr.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["start", "n"])
def matmul_descriptor_kernel(
    x,  # (·, K) in blocks of (BLOCK_M, BLOCK_K)
    w,  # (N, K) in blocks of (BLOCK_N, BLOCK_K), or (K, N) in blocks of (BLOCK_K, BLOCK_N)
    bias_ptr,  # (N,)
    y,  # (n, N) in blocks of (BLOCK_M, BLOCK_N / 2)
    aux,  # as y: act(Y) written, or Z read
    count_ptr,
    start,
    n,
    N,
    K,
    TRANSPOSED: tl.constexpr,  # w is (N, K)
    COUNT: tl.constexpr,
    BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    live = n
    if COUNT:
        live = tl.minimum(n, tl.load(count_ptr) - start)
    tiles_m, tiles_n = tl.cdiv(live, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # flattened, the loads of the next tile are under way during the epilogue of this one
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

        # rows from the count on are computed from whatever x holds there, and stored as far as y reaches
        parts = halves(b_y)
        HALF: tl.constexpr = BLOCK_N // 2
        for i in tl.static_range(2):
            b_part = parts[i]
            first = i_n * BLOCK_N + i * HALF
            if BIAS:
                o_q = first + tl.arange(0, HALF)
                b_part += widen(tl.load(bias_ptr + o_q, mask=o_q < N, other=0.0))[None, :]
            if EPILOGUE == "activate_grad":
                b_part *= activate_grad(widen(aux.load([i_m * BLOCK_M, first])), ACTIVATION)
            y.store([i_m * BLOCK_M, first], narrow(b_part, y.dtype))
            if EPILOGUE == "activate":
                aux.store([i_m * BLOCK_M, first], narrow(activate(b_part, ACTIVATION), aux.dtype))


def matmul(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    count: Tensor | None = None,
    start: int = 0,
    aux: Tensor | None = None,
    epilogue: str = "none",
    activation: str = "gelu",
) -> None:
    """Y[i] = x[index[start + i]] · w (+ bias), for the rows i of `y` with start + i < count.

    Args:
        x: (·, K), any strides; its elements are cast to w's dtype.
        w: (K, N), any strides.
        y: (n, N) contiguous. What its rows from the count on hold afterwards is undefined, and so it is for `aux`.
        bias: (N,) or None.
        index: (capacity,) rows of x; None = x's own first n rows.
        count: 0-d int32 on the device; None = all.
        aux: (n, N) contiguous. epilogue "activate" writes act(Y) to it; "activate_grad" multiplies Y by act'(aux), and
            y may be aux.

    Where tensor descriptors can be had (see `tiles.descriptor_tile`) and nothing is gathered, the kernel is persistent.
    """
    n, (K, N) = y.shape[0], w.shape
    transposed = w.stride(0) == 1
    w_rows = w.t() if transposed else w
    aux = None if epilogue == "none" else aux
    tile = tiles.descriptor_tile(x, w_rows, (y, aux), n, N) if index is None else None
    shared = {
        "COUNT": count is not None,
        "BIAS": bias is not None,
        "EPILOGUE": epilogue,
        "ACTIVATION": activation,
        **OPTIONS,
    }
    with on_device(x):
        if tile is not None:
            half = tile.n // 2
            matmul_descriptor_kernel[(tiles.programs(tile, n, N, x),)](
                tiles.describe(x, tile.m, tile.k),
                tiles.describe(w_rows, tile.n, tile.k) if transposed else tiles.describe(w_rows, tile.k, tile.n),
                bias,
                tiles.describe(y, tile.m, half),
                None if aux is None else tiles.describe(aux, tile.m, half),
                count,
                start,
                n,
                N,
                K,
                TRANSPOSED=transposed,
                **tiles.constants(tile),
                num_stages=tile.stages - (epilogue == "activate_grad"),  # reading aux takes the memory of a stage
                **shared,
            )
            return
        tile = tiles.pointer_tile(x, w, n, N)
        matmul_kernel[(triton.cdiv(n, tile.m) * triton.cdiv(N, tile.n),)](
            x,
            w,
            bias,
            y,
            aux,
            index,
            count,
            start,
            n,
            N,
            K,
            *x.stride(),
            *w.stride(),
            GATHER=index is not None,
            PRECISION=input_precision(w.dtype),
            **tiles.constants(tile),
            num_stages=tile.stages,
            **shared,
        )
