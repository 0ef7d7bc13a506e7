"""float8 rows (e4m3), each with a scale of its own, written by the passes that have the rows in registers anyway."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import narrow

LARGEST = tl.constexpr(448.0)  # of e4m3


class Quantized(NamedTuple):
    """(n, K) float8_e4m3fn contiguous and (n,) float32: rows are values · scale."""

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, like: Tensor, n: int, width: int) -> Quantized:
        values = like.new_empty(n, width, dtype=torch.float8_e4m3fn)
        return cls(values, like.new_empty(n, dtype=torch.float32))

    def rows(self, n: int, width: int) -> Quantized:
        """A corner of the memory as (n, width)."""
        return Quantized(self.values.view(-1)[: n * width].view(n, width), self.scales[:n])


@triton.jit
def store_quantized(q_ptr, scales_ptr, b_x, o_n, o_b, last, columns):
    """Rows o_n < last of b_x (rows, block), where a block holds a whole row."""
    largest = tl.max(tl.abs(b_x), 1)
    scale = tl.where(largest > 0.0, largest / LARGEST, 1.0)
    tl.store(scales_ptr + o_n, scale, mask=o_n < last)
    p_q = q_ptr + o_n.to(tl.int64)[:, None] * columns + o_b[None, :]
    mask = (o_n < last)[:, None] & (o_b < columns)[None, :]
    tl.store(p_q, narrow(b_x / scale[:, None], q_ptr.dtype.element_ty), mask=mask)
