"""The activations and their derivatives, as passes over rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import WARPS, RowShape, add_column_sum, cdiv, live_rows, narrow, on_device, widen
from .quantize import Quantized, store_quantized


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Return act(x) in float32. DTYPE is the dtype that stored x, and sets how exact the result has
    to be."""
    if ACTIVATION == "gelu":
        if tl.float32 == DTYPE:
            y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        else:
            ratio, e = normal_tail(x, DTYPE)
            tail = ratio * e
            y = x * tl.where(x < 0, tail, 1.0 - tail)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 · (1 + tanh(u)) = sigmoid(2u)
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), DTYPE)
    elif ACTIVATION == "silu":
        y = x * sigmoid(x, DTYPE)
    elif ACTIVATION == "relu":
        y = tl.where(x <= 0, 0.0, x)  # A NaN stays a NaN.
    else:
        tl.static_assert(False, "activate: no branch for this ACTIVATION")
    return y


@triton.jit
def activate_grad(x, dy, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Return dy · act'(x) in float32; DTYPE as in `activate`."""
    if ACTIVATION == "gelu":
        if tl.float32 == DTYPE:
            cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        else:
            ratio, e = normal_tail(x, DTYPE)
            falling = (ratio - 0.3989422804014327 * tl.abs(x)) * e  # act'(-|x|)
            slope = tl.where(x < 0, falling, 1.0 - falling)
        dx = dy * slope
    elif ACTIVATION == "gelu_tanh":
        s, slope = sigmoid_grad(1.5957691216057308 * (x + 0.044715 * x * x * x), DTYPE)
        dx = dy * (s + x * slope * (1.5957691216057308 + 0.2140644488178315 * x * x))
    elif ACTIVATION == "silu":
        s, slope = sigmoid_grad(x, DTYPE)
        dx = dy * (s + x * slope)
    elif ACTIVATION == "relu":
        dx = tl.where(x > 0, dy, 0.0)  # A product with 0 would turn an infinite dy into nan.
    else:
        tl.static_assert(False, "activate_grad: no branch for this ACTIVATION")
    return dx


@triton.jit
def normal_tail(x, DTYPE: tl.constexpr):
    """Return R and e = exp(-x² / 2), where R · e = erfc(|x| / √2) / 2 is the normal distribution
    beyond |x|.

    The form is 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions, with one term
    more: a polynomial in k = 1 / (1 + c|x|). Its coefficients are a minimax fit to float64's erfcx
    over |x| ≤ 14.5. The error relative to R is at most 6.7e-7 · (1 + (x / 3)⁴), which is 3e-4 at
    14. Rounding in float32 adds as much again.
    """
    k = reciprocal(1.0 + 0.295 * tl.abs(x), DTYPE)
    ratio = 0.26183088 + k * -0.08681131
    ratio = 0.11874798 + k * (0.10483433 + k * (0.16999095 + k * (-0.06859316 + k * ratio)))
    return k * ratio, tl.exp2(x * x * -0.7213475204444817)


@triton.jit
def reciprocal(x, DTYPE: tl.constexpr):
    """Return 1 / x for x ≥ 1. In half precision this squares the reciprocal square root, which
    takes a GPU one instruction where `/` takes six. The square is off by 3e-7 at most."""
    if tl.float32 == DTYPE:
        return 1.0 / x
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x, DTYPE: tl.constexpr):
    return reciprocal(1.0 + tl.exp(-x), DTYPE)


@triton.jit
def sigmoid_grad(x, DTYPE: tl.constexpr):
    """Return sigmoid(x) and its derivative, without a subtraction that cancels."""
    e = tl.exp(-tl.abs(x))
    large = reciprocal(1.0 + e, DTYPE)
    small = e * large
    return tl.where(x < 0, small, large), large * small


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
    b_z = widen(tl.load(z_ptr + o_z, mask=mask, other=0.0))
    b_g = activate(b_z, ACTIVATION, z_ptr.dtype.element_ty)
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
        b_z = activate_grad(b_z, b_dg, ACTIVATION, z_ptr.dtype.element_ty)
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
    """Write g = act(z), for the rows i with start + i < count.

    z, g: (n, M) contiguous. quantized: receives the same rows of g in float8.
    """
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
            num_warps=WARPS,
            **shape.constants,
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
    """Overwrite z by dz = dg · act'(z), for the rows i with start + i < count. If `sums` is given,
    store the column sums of dz there (`first`) or add them.

    dg, z: (n, M) contiguous. sums: (S, M) float32; S programs share the work, and the S rows add up
    to the sum. quantized: receives the rows of dz in float8.
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
            num_warps=WARPS,
            **shape.constants,
        )
