"""The activations and their derivatives, as passes over rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, WARPS, RowShape, add_column_sum, cdiv, live_rows, narrow, on_device, widen
from .quantize import Quantized, store_quantized


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x), float32."""
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 · (1 + tanh(u)) = sigmoid(2u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    else:
        y = tl.where(x <= 0, 0.0, x)  # so that a NaN stays one
    return y


@triton.jit
def sigmoids(x):
    """sigmoid(x) and 1 - sigmoid(x), neither by a subtraction that cancels."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def activate_grad(x, ACTIVATION: tl.constexpr):
    """act'(x), float32; relu's is a choice, not a factor."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        s, rest = sigmoids(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * rest * (1.5957691216057308 + 0.2140644488178315 * x * x)
    else:
        s, rest = sigmoids(x)
        y = s * (1.0 + x * rest)
    return y


@triton.jit(do_not_specialize=["start", "n"])
def activate_kernel(
    z_ptr,  # (n, M)
    g_ptr,  # (n, M)
    q_ptr,  # (n, M) float8
    scales_ptr,  # (n,)
    count_ptr,
    start,
    n,
    M,
    ACTIVATION: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    live = live_rows(count_ptr, start, n, COUNT)
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_z = o_n.to(tl.int64)[:, None] * M + o_m[None, :]
    mask = (o_n < live)[:, None] & (o_m < M)[None, :]
    b_g = activate(widen(tl.load(z_ptr + o_z, mask=mask, other=0.0)), ACTIVATION)
    tl.store(g_ptr + o_z, narrow(b_g, g_ptr.dtype.element_ty), mask=mask)
    if q_ptr is not None:
        store_quantized(q_ptr, scales_ptr, b_g, o_n, o_m, live, M)


@triton.jit(do_not_specialize=["start", "n"])
def activate_grad_kernel(
    dg_ptr,  # (n, M)
    z_ptr,  # (n, M); dZ is written over it
    q_ptr,  # (n, M) float8
    scales_ptr,  # (n,)
    sums_ptr,  # (programs along axis 0, M) float32
    count_ptr,
    start,
    n,
    M,
    ACTIVATION: tl.constexpr,
    SUM: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    live = live_rows(count_ptr, start, n, COUNT)
    o_m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, live, tl.num_programs(0) * ROWS):
        o_n = first + tl.arange(0, ROWS)
        o_z = o_n.to(tl.int64)[:, None] * M + o_m[None, :]
        mask = (o_n < live)[:, None] & (o_m < M)[None, :]
        b_z = widen(tl.load(z_ptr + o_z, mask=mask, other=0.0))
        b_dg = widen(tl.load(dg_ptr + o_z, mask=mask, other=0.0))
        if ACTIVATION == "relu":
            b_z = tl.where(b_z > 0, b_dg, 0.0)  # not 0 · inf, which is no number
        else:
            b_z = activate_grad(b_z, ACTIVATION) * b_dg
        tl.store(z_ptr + o_z, narrow(b_z, z_ptr.dtype.element_ty), mask=mask)
        if q_ptr is not None:
            store_quantized(q_ptr, scales_ptr, b_z, o_n, o_m, live, M)
        if SUM:
            b_sum += b_z
    if SUM:
        add_column_sum(sums_ptr, b_sum, o_m, M, M, FIRST)


def apply_activation(
    z: Tensor,
    g: Tensor,
    activation: str,
    *,
    count: Tensor | None = None,
    start: int = 0,
    quantized: Quantized | None = None,
) -> None:
    """g = act(z) over the rows i with start + i < count; z, g: (n, M) contiguous; quantized: the same rows of g."""
    n, M = z.shape
    shape = RowShape.of(M)
    q, scales = quantized or (None, None)
    with on_device(z):
        activate_kernel[cdiv(n, shape.rows), cdiv(M, shape.block)](
            z,
            g,
            q,
            scales,
            count,
            start,
            n,
            M,
            ACTIVATION=activation,
            COUNT=count is not None,
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=WARPS,
            **OPTIONS,
        )


def apply_activation_grad(
    dg: Tensor,
    z: Tensor,
    activation: str,
    *,
    sums: Tensor | None = None,
    first: bool = True,
    count: Tensor | None = None,
    start: int = 0,
    quantized: Quantized | None = None,
) -> None:
    """z becomes dz = dg · act'(z), over the rows i with start + i < count; with `sums` its column sums are stored there
    (`first`) or added.

    dg, z: (n, M) contiguous; sums: (S, M) float32, whose S rows add up to the sum: as many programs share the work;
    quantized: the rows of dz.
    """
    n, M = z.shape
    shape = RowShape.of(M)
    programs = shape.programs(n) if sums is None else sums.shape[0]
    q, scales = quantized or (None, None)
    with on_device(z):
        activate_grad_kernel[programs, cdiv(M, shape.block)](
            dg,
            z,
            q,
            scales,
            sums,
            count,
            start,
            n,
            M,
            ACTIVATION=activation,
            SUM=sums is not None,
            FIRST=first and sums is not None,
            COUNT=count is not None,
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=WARPS,
            **OPTIONS,
        )
