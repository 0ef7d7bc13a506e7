"""Shared by all launchers: the device's class, the tensor's own device, the options of every
kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter computes a bfloat16 dot from raw bits, truncates where a GPU rounds to
# bfloat16, reads a bfloat16 zero as 1e-38, truncates to float8, and loses its NaN. So the code
# converts by hand in the interpreter, and only there.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Triton 3.10 turns contraction to FMA off by default; the error bounds were set with it on.
OPTIONS = {"enable_fp_fusion": True}

# A program of a row kernel holds TILE elements at a time: many short rows, or one row of up to
# LONGEST columns. It reads a longer row in blocks of TILE.
TILE = 4096
LONGEST = 8192
# A row kernel has 8 elements a thread, which are 16 bytes of a half-precision row. AMD does not
# allow more warps.
WARPS = 16
# A row kernel has at most this many programs, two for each SM of an H200. Each keeps its own column
# sum.
PROGRAMS = 264


def cdiv(a: int, b: int) -> int:
    """Return ⌈a / b⌉. `triton.cdiv` also works in kernels, and takes sixty times as long on the
    host."""
    return -(-a // b)


def power_of_2(x: int) -> int:
    """Return the smallest power of 2 that is at least x ≥ 1."""
    return 1 << (x - 1).bit_length()


class RowShape(NamedTuple):
    """How a row kernel splits (n, width): a program holds `rows` rows of `block` columns at a
    time."""

    rows: int
    block: int
    whole: bool  # a row fits one block
    constants: dict[str, Any]  # what a launch passes for them

    @classmethod
    @lru_cache
    def of(cls, width: int) -> RowShape:
        block = power_of_2(width)
        block = TILE if block > LONGEST else block
        rows = max(1, TILE // block)
        return cls(rows, block, block >= width, {"ROWS": rows, "BLOCK": block, **OPTIONS})

    def programs(self, n: int) -> int:
        return max(1, min(PROGRAMS, cdiv(n, self.rows)))


@lru_cache
def _arch(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx"
    # Consumer Blackwell (sm_120) has as much shared memory as consumer Ampere.
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(
        torch.cuda.get_device_capability(index)[0], "sm80"
    )


def arch(tensor: Tensor) -> str:
    """Return the class of device, which is the key of the shape tables: "sm80", "sm90", "sm100" or
    "gfx" (AMD)."""
    return _arch(tensor.device.index) if tensor.is_cuda else "sm90"


HERE = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, because Triton launches on the current device, which may be
    another one (`device_map="auto"`)."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(tensor.device)


@triton.jit
def widen(x):
    """Return x in float32."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Return float32 x in DTYPE, rounded to nearest even."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if INTERPRET and tl.float8e4nv == DTYPE:
        quantum = tl.exp2(tl.maximum(tl.floor(tl.log2(tl.abs(x))), -6.0) - 3.0)
        # Adding 1.5 · 2^23 rounds to an integer.
        rounded = (x / quantum + 12582912.0 - 12582912.0) * quantum
        bits = rounded.to(DTYPE).to(tl.uint8, bitcast=True)
        return tl.where(x == x, bits, 0x7F).to(tl.uint8).to(DTYPE, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, total, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Return total + a · b, with the product in DTYPE."""
    if INTERPRET:
        return tl.dot(widen(narrow(widen(a), DTYPE)), widen(narrow(widen(b), DTYPE)), total)
    return tl.dot(a.to(DTYPE), b.to(DTYPE), total, input_precision=PRECISION)


@triton.jit
def live_rows(count_ptr, start, n, COUNT: tl.constexpr):
    """Return how many of a chunk's n rows, which begin at `start` of the selection, are
    selected."""
    if COUNT:
        return tl.minimum(n, tl.load(count_ptr) - start)
    return n


@triton.jit
def load_columns(p_x, d, D, stride_xd, m_n, o_b):
    """Return the columns d + o_b of rows, in float32."""
    mask = m_n[:, None] & (d + o_b < D)[None, :]
    return widen(tl.load(p_x + tl.cast(d, tl.int64) * stride_xd, mask=mask, other=0.0))


@triton.jit
def columns_of(b_x, p_x, d, D, stride_xd, m_n, o_b, WHOLE: tl.constexpr):
    """Return the same columns; if a row fits one block, b_x holds them already."""
    if WHOLE:
        return b_x
    return load_columns(p_x, d, D, stride_xd, m_n, o_b)


@triton.jit
def add_column_sum(sums_ptr, b_sum, o_b, stride, columns, FIRST: tl.constexpr):
    """Store the column sums of b_sum (rows, block) in this program's row of sums (programs,
    stride), or add them there. There are no atomics, so the order is fixed."""
    b_total = tl.sum(b_sum, 0)
    p_sums = sums_ptr + tl.program_id(0).to(tl.int64) * stride + o_b
    if not FIRST:
        b_total += tl.load(p_sums, mask=o_b < columns, other=0.0)
    tl.store(p_sums, b_total, mask=o_b < columns)


@triton.jit
def sum_two(a, b):
    """Return the sums of two (rows, block) along the rows, in one exchange between warps."""
    if INTERPRET:  # In the interpreter `tl.reduce` would add the numbers one by one in Python.
        return tl.sum(a, 1), tl.sum(b, 1)
    return tl.reduce((a, b), 1, add_two)


@triton.jit
def sum_three(a, b, c):
    """Return the sums of three (rows, block) along the rows, as `sum_two` does."""
    if INTERPRET:
        return tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)
    return tl.reduce((a, b, c), 1, add_three)


@triton.jit
def add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f
