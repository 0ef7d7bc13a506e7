"""Products of a chunk's rows with a weight: gather in the prologue, bias and activation in the epilogue."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, activate_grad
from .launch import OPTIONS, arch, dot, narrow, on_device, widen


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


# Fixed by architecture and width of an element, never by the ragged number of rows. Shared memory of a block: 227 KiB
# on sm90, 163 KiB on sm80 (99 KiB on its consumer kin), 64 KiB on gfx942. IEEE float32 has no tensor cores and needs
# its accumulators' registers for operands.
TILES = {
    ("sm90", 2): Tile(128, 256, 64, 8, 3),
    ("sm90", 4): Tile(128, 128, 16, 8, 3),
    ("sm80", 2): Tile(128, 128, 32, 8, 3),
    ("sm80", 4): Tile(128, 128, 16, 8, 3),
    ("gfx", 2): Tile(128, 128, 32, 4, 2),
    ("gfx", 4): Tile(128, 128, 16, 8, 2),
}
# Where rows do not start at multiples of 16 elements, loads are an element wide and pass through registers.
UNALIGNED = Tile(64, 64, 16, 4, 2)
GROUP_M = 8  # row tiles that share a column tile of the weight while it is in the L2 cache


def input_precision(dtype: torch.dtype) -> str:
    """ "ieee" unless the user let float32 products be tf32; a plain `tl.dot` would be tf32 without asking."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def tile_for(x: Tensor, w: Tensor) -> Tile:
    """The tile for a product of `x` with `w`, whose dtype it is taken in."""
    aligned = all(stride == 1 or stride % 16 == 0 for stride in (*x.stride(), *w.stride()))
    return TILES[arch(x), w.element_size()] if aligned else UNALIGNED


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile coordinates of a program, going down groups of GROUP_M row tiles."""
    group = GROUP_M * tiles_n
    first_m = pid // group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + pid % group % rows, pid % group // rows


@triton.jit
def quarters(b_y, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The four (BLOCK_M, BLOCK_N / 4) parts of a tile, from left to right."""
    HALF: tl.constexpr = BLOCK_N // 2
    QUARTER: tl.constexpr = BLOCK_N // 4
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_y, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    b_0, b_1 = tl.split(tl.permute(tl.reshape(b_left, (BLOCK_M, 2, QUARTER)), (0, 2, 1)))
    b_2, b_3 = tl.split(tl.permute(tl.reshape(b_right, (BLOCK_M, 2, QUARTER)), (0, 2, 1)))
    return b_0, b_1, b_2, b_3


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
    parts = quarters(b_y, BLOCK_M, BLOCK_N)
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
        y: (n, N) contiguous.
        bias: (N,) or None.
        index: (capacity,) rows of x; None = x's own first n rows.
        count: 0-d int32 on the device; None = all.
        aux: (n, N) contiguous. epilogue "activate" writes act(Y) to it; "activate_grad" multiplies Y by act'(aux), and
            y may be aux.
    """
    n, (K, N) = y.shape[0], w.shape
    tile = tile_for(x, w)
    grid = (triton.cdiv(n, tile.m) * triton.cdiv(N, tile.n),)
    with on_device(x):
        matmul_kernel[grid](
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
            COUNT=count is not None,
            BIAS=bias is not None,
            EPILOGUE=epilogue,
            ACTIVATION=activation,
            PRECISION=input_precision(w.dtype),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            GROUP_M=GROUP_M,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **OPTIONS,
        )
