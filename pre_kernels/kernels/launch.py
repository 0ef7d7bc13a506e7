"""What every launcher needs: the device's class, the tensor's own device, the options that hold for all kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter computes a bfloat16 dot from raw bits, truncates where a GPU rounds to bfloat16, and reads a
# bfloat16 zero as 1e-38: there, and only there, conversions are done by hand
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Triton 3.10 turns contraction to FMA off by default; the error bounds were set with it on
OPTIONS = {"enable_fp_fusion": True}


@lru_cache
def _arch(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx"
    # consumer Blackwell (sm_120) has the shared memory of its Ampere kin
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(torch.cuda.get_device_capability(index)[0], "sm80")


def arch(tensor: Tensor) -> str:
    """The class of device that the shape tables are keyed by: "sm80", "sm90", "sm100" or "gfx" (AMD)."""
    return _arch(tensor.device.index) if tensor.is_cuda else "sm90"


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's (`device_map="auto"`)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def widen(x):
    """x in float32."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 x in DTYPE, rounded to nearest even."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, total, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a · b, the product taken in DTYPE."""
    if INTERPRET:
        return tl.dot(widen(narrow(widen(a), DTYPE)), widen(narrow(widen(b), DTYPE)), total)
    return tl.dot(a.to(DTYPE), b.to(DTYPE), total, input_precision=PRECISION)
