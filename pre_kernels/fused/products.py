"""Matmuls by the vendor's library, into existing buffers."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

# This many rows of half precision are copied to float32 at a time, into memory that is reused.
COPIED_ROWS = 1024


def _half_units() -> str | None:
    """Name the instructions that make this CPU's bfloat16 products faster than its float32 ones, or
    return None."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        # A build without oneDNN, such as Apple's, does not have the question.
        known = (
            torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        return "bf16 instructions" if known else None
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    # On AMD these instructions do twice as many products a cycle as float32 ones do. On Intel
    # without AMX bfloat16 products take 1.9 times as long as float32 ones.
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() and _is_amd() else None


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # Only Linux has this file.
        return "AuthenticAMD" in platform.processor()


# The question is asked at import because Dynamo cannot trace it.
HALF_UNITS = _half_units()


def fastest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which products of `dtype` inputs are fastest on `device`.

    On a CPU without instructions for it, half precision is slower than float32 and rounds more. On
    any CPU, float16 products are at best float32 ones.
    """
    if device.type != "cpu" or dtype.itemsize > 2 or (dtype == torch.bfloat16 and HALF_UNITS):
        return dtype
    return torch.float32


def half_precision() -> str:
    """Say in words which dtype this CPU uses for half-precision products, and why."""
    if HALF_UNITS:
        return f"bf16 in bf16 ({HALF_UNITS}), fp16 in fp32"
    return "bf16 and fp16 in fp32 (this CPU has no units that make half precision faster)"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x · weightᵀ + bias to out. x: (n, K), weight: (N, K), bias: (N,) or None, out: (n, N),
    all of one dtype."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def scaled_linear(
    x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None, out: Tensor
) -> None:
    """Do the same as `linear` with float8 rows that have a scale each. x: (n, K) and (n,), weight:
    (N, K) and (N,), out: (n, N) bfloat16."""
    scales = {"scale_a": x[1][:, None], "scale_b": weight[1][None, :]}
    torch._scaled_mm(
        x[0], weight[0].t(), **scales, bias=bias, out_dtype=out.dtype, use_fast_accum=True, out=out
    )


def _widened(total: Tensor, dyt: Tensor, x: Tensor, first: bool) -> None:
    """Write the half-precision product dyt · x to a float32 matrix, or add it there."""
    if first:
        torch.ops.aten.mm.dtype_out(dyt, x, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, dyt, x, total.dtype, out=total)


@lru_cache
def _widens(device: torch.device, dtype: torch.dtype, first: bool) -> bool:
    """Whether the library can do what `_widened` asks. Older versions refuse to add across dtypes,
    and cuBLAS refuses float16 where `allow_fp16_accumulation` is set."""
    total = torch.zeros(16, 16, device=device)
    x = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        _widened(total, x, x, first)
    except torch.OutOfMemoryError:  # This does not answer the question.
        raise
    except RuntimeError:
        return False
    return True


def wide_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x · yᵀ in float32. x: (n, K), y: (m, K), of one dtype."""
    total = x.new_empty(len(x), len(y), dtype=torch.float32)
    if x.dtype == total.dtype or not (x.is_cuda and _widens(x.device, x.dtype, True)):
        return torch.mm(x.float(), y.float().t(), out=total)
    _widened(total, x, y.t(), True)
    return total


def add_product(total: Tensor, dy: Tensor, x: Tensor, first: bool, copies: bool = False) -> bool:
    """Compute total += dyᵀ·x, or total = dyᵀ·x if `first`; return whether that was possible.

    dy: (n, M), x: (n, N), total: (M, N) in their dtype or float32. Where the library cannot add a
    half-precision product to float32, this does nothing and returns False, unless `copies` allows
    float32 copies of dy and x. It does not round the product to half precision, because where
    chunks cancel the rounding error would exceed the sum, and in float16 the product could
    overflow.
    """
    if total.dtype == dy.dtype:
        if first:
            torch.mm(dy.t(), x, out=total)
        else:
            total.addmm_(dy.t(), x)
    elif total.is_cuda and _widens(total.device, dy.dtype, first):
        _widened(total, dy.t(), x, first)
    elif copies:
        for part, (some_dy, some_x) in enumerate(
            zip(dy.split(COPIED_ROWS), x.split(COPIED_ROWS), strict=True)
        ):
            add_product(total, some_dy.to(total.dtype), some_x.to(total.dtype), first and part == 0)
    else:
        return False
    return True
