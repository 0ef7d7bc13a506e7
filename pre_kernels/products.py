"""The matrix products of the vendor's library, into buffers that exist."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x · weightᵀ + bias; x: (n, K), weight: (N, K), bias: (N,) or None, out: (n, N), all of one dtype."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def scaled_linear(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None, out: Tensor) -> None:
    """`linear` of float8 rows, each with a scale: x: (n, K) and (n,), weight: (N, K) and (N,), out: (n, N) bfloat16."""
    scales = {"scale_a": x[1][:, None], "scale_b": weight[1][None, :]}
    torch._scaled_mm(x[0], weight[0].t(), **scales, bias=bias, out_dtype=out.dtype, use_fast_accum=True, out=out)


@lru_cache
def _sums_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this version of torch adds a half-precision product to a float32 matrix; older ones refuse the dtypes."""
    total, x = torch.zeros(16, 16, device=device), torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, x, x, torch.float32, out=total)
    except RuntimeError as error:
        if "dtype" not in str(error):  # out of memory, say: no answer to the question
            raise
        return False
    return True


def add_product(total: Tensor, dy: Tensor, x: Tensor, first: bool, copies: bool = False) -> bool:
    """total += dyᵀ·x, or = if `first`; dy: (n, M), x: (n, N), total: (M, N) in their dtype or float32.

    False, and nothing done, where the library cannot add half precision to float32, unless `copies` of dy and x in
    float32 may be made. Rounded to half precision, the product of a chunk would lose what the sum of all is left with
    where chunks cancel, and in float16 overflow.
    """
    if total.dtype == dy.dtype:
        if first:
            torch.mm(dy.t(), x, out=total)
        else:
            total.addmm_(dy.t(), x)
    elif total.is_cuda and first:
        torch.ops.aten.mm.dtype_out(dy.t(), x, total.dtype, out=total)
    elif total.is_cuda and _sums_in_place(total.device, dy.dtype):
        torch.ops.aten.addmm.dtype_out(total, dy.t(), x, total.dtype, out=total)
    elif copies:
        return add_product(total, dy.to(total.dtype), x.to(total.dtype), first)
    else:
        return False
    return True
