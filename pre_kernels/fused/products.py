"""The matrix products of the vendor's library, into buffers that exist."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

# So many rows of half precision are copied to float32 at a time, into memory that is used again.
COPIED_ROWS = 1024


def _half_units() -> str | None:
    """What makes this CPU's bfloat16 products faster than its float32 ones; None if nothing
    does."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        # A build without oneDNN, such as Apple's, cannot answer the question either.
        known = (
            torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        return "bf16 instructions" if known else None
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    # AMD's do twice as many products a cycle as in float32; on Intel's without AMX products take
    # 1.9 times as long as in float32.
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() and _is_amd() else None


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # another system
        return "AuthenticAMD" in platform.processor()


HALF_UNITS = _half_units()  # asked once: Dynamo cannot trace the question


def fastest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products of `dtype` inputs are best taken in: on a CPU without units for them half
    precision is slower than float32, and rounds more. A CPU's float16 products are float32 ones at
    best."""
    if device.type != "cpu" or dtype.itemsize > 2 or (dtype == torch.bfloat16 and HALF_UNITS):
        return dtype
    return torch.float32


def half_precision() -> str:
    """What a CPU's half-precision products are taken in here, and why, for people."""
    if HALF_UNITS:
        return f"bf16 in bf16 ({HALF_UNITS}), fp16 in fp32"
    return "bf16 and fp16 in fp32 (this CPU has no units that make half precision faster)"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x · weightᵀ + bias; x: (n, K), weight: (N, K), bias: (N,) or None, out: (n, N), all of
    one dtype."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def scaled_linear(
    x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None, out: Tensor
) -> None:
    """`linear` of float8 rows, each with a scale: x: (n, K) and (n,), weight: (N, K) and (N,), out:
    (n, N) bfloat16."""
    scales = {"scale_a": x[1][:, None], "scale_b": weight[1][None, :]}
    torch._scaled_mm(
        x[0], weight[0].t(), **scales, bias=bias, out_dtype=out.dtype, use_fast_accum=True, out=out
    )


def _widened(total: Tensor, dyt: Tensor, x: Tensor, first: bool) -> None:
    """The half-precision product dyᵀ·x in, or added to, a float32 matrix."""
    if first:
        torch.ops.aten.mm.dtype_out(dyt, x, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, dyt, x, total.dtype, out=total)


@lru_cache
def _widens(device: torch.device, dtype: torch.dtype, first: bool) -> bool:
    """Whether the library does what `_widened` asks: older versions refuse the dtypes of a sum, and
    cuBLAS those of float16 where `allow_fp16_accumulation` is set."""
    total = torch.zeros(16, 16, device=device)
    x = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        _widened(total, x, x, first)
    except torch.OutOfMemoryError:  # no answer to the question
        raise
    except RuntimeError:
        return False
    return True


def add_product(total: Tensor, dy: Tensor, x: Tensor, first: bool, copies: bool = False) -> bool:
    """total += dyᵀ·x, or = if `first`; dy: (n, M), x: (n, N), total: (M, N) in their dtype or
    float32.

    False, and nothing done, where the library does not take half precision to float32, unless
    `copies` of dy and x in float32 may be made. Rounded to half precision, the product of a chunk
    would lose what the sum of all is left with where chunks cancel, and in float16 overflow.
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
