"""Launches before and after the chunks: the divisor of a mean, the loss, the scaled gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, cdiv, live_rows, narrow, on_device, widen
from .rows import load_scale

BLOCK = 4096  # The single program of a reduction adds this many rows at a time.
ELEMENTS = 4096  # One program scales this many elements of a weight's gradient.
# A program of a bias gradient adds SLOTS rows of partial column sums at a time, in COLUMNS columns.
SLOTS = 32
COLUMNS = 128


@triton.jit
def sum_rows(x_ptr, index_ptr, live, BLOCK: tl.constexpr):
    """Return Σ x[index[i]] over i < live, or Σ x[i] if there is no index."""
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, live, BLOCK):
        o_n = first + tl.arange(0, BLOCK)
        rows = o_n.to(tl.int64)
        if index_ptr is not None:
            rows = tl.load(index_ptr + o_n, mask=o_n < live, other=0).to(tl.int64)
        b_sum += tl.load(x_ptr + rows, mask=o_n < live, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit(do_not_specialize=["capacity", "number"])
def divisor_kernel(
    weight_ptr,  # (·,) float32, gathered by index
    index_ptr,  # (capacity,)
    count_ptr,
    normalizer_ptr,  # 0-d
    divisor_ptr,  # 0-d float32
    capacity,
    number,
    MEAN: tl.constexpr,
    NUMBER: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = capacity
    if COUNT:
        count = tl.load(count_ptr)
    divisor = 1.0
    if MEAN:
        if normalizer_ptr is not None:
            divisor = tl.load(normalizer_ptr).to(tl.float32)
        elif NUMBER:
            divisor = number * 1.0
        elif weight_ptr is not None:
            divisor = sum_rows(weight_ptr, index_ptr, tl.minimum(count, capacity), BLOCK)
        else:
            divisor = count * 1.0
        # The mean of an empty batch is 0, not nan. A mean of some rows with the divisor 0 is nan.
        divisor = tl.where(count == 0, 1.0, tl.where(divisor == 0.0, float("nan"), divisor))
    # Rows beyond the capacity were dropped. The host does not know it, so the result has to be nan.
    tl.store(divisor_ptr, tl.where(count > capacity, float("nan"), divisor))


@triton.jit(do_not_specialize=["capacity"])
def reduce_kernel(
    losses_ptr,  # (capacity,) float32
    count_ptr,
    divisor_ptr,  # 0-d float32
    loss_ptr,  # 0-d float32
    capacity,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = sum_rows(losses_ptr, None, live_rows(count_ptr, 0, capacity, COUNT), BLOCK)
    tl.store(loss_ptr, total / tl.load(divisor_ptr))


@triton.jit
def scale_matrix(x_ptr, out_ptr, pid, size, scale, IN_PLACE: tl.constexpr, ELEMENTS: tl.constexpr):
    if not IN_PLACE or scale != 1.0:
        o_x = pid.to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        b_x = widen(tl.load(x_ptr + o_x, mask=o_x < size, other=0.0)) * scale
        tl.store(out_ptr + o_x, narrow(b_x, out_ptr.dtype.element_ty), mask=o_x < size)


@triton.jit
def scale_sums(
    sums_ptr, out_ptr, pid, slots, columns, scale, SLOTS: tl.constexpr, COLUMNS: tl.constexpr
):
    o_c = pid * COLUMNS + tl.arange(0, COLUMNS)
    b_sum = tl.zeros((SLOTS, COLUMNS), tl.float32)
    for first in range(0, slots, SLOTS):
        o_s = first + tl.arange(0, SLOTS)
        mask = (o_s < slots)[:, None] & (o_c < columns)[None, :]
        b_sum += tl.load(sums_ptr + o_s[:, None] * columns + o_c[None, :], mask=mask, other=0.0)
    tl.store(
        out_ptr + o_c,
        narrow(tl.sum(b_sum, 0) * scale, out_ptr.dtype.element_ty),
        mask=o_c < columns,
    )


@triton.jit(
    do_not_specialize=[
        "blocks_w1",
        "blocks_w2",
        "blocks_w3",
        "blocks_b1",
        "blocks_b2",
        "slots_1",
        "slots_2",
        "slots_3",
    ]
)
def scale_kernel(
    dw1_ptr,
    dw2_ptr,
    dw3_ptr,
    db1_ptr,  # (slots, columns) float32
    db2_ptr,
    db3_ptr,
    out_w1_ptr,
    out_w2_ptr,
    out_w3_ptr,
    out_b1_ptr,  # (columns,)
    out_b2_ptr,
    out_b3_ptr,
    upstream_ptr,  # 0-d
    blocks_w1,  # the programs of each tensor
    blocks_w2,
    blocks_w3,
    blocks_b1,
    blocks_b2,
    size_w1,
    size_w2,
    size_w3,
    slots_1,
    slots_2,
    slots_3,
    columns_1,
    columns_2,
    columns_3,
    IN_PLACE_W1: tl.constexpr,
    IN_PLACE_W2: tl.constexpr,
    IN_PLACE_W3: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scale six tensors, one after the other, in one grid: at small N a launch for each would take
    longer than the work."""
    scale = load_scale(upstream_ptr, None)
    pid = tl.program_id(0)
    end_w1 = blocks_w1
    end_w2 = end_w1 + blocks_w2
    end_w3 = end_w2 + blocks_w3
    end_b1 = end_w3 + blocks_b1
    end_b2 = end_b1 + blocks_b2
    if pid < end_w1:
        if dw1_ptr is not None:
            scale_matrix(dw1_ptr, out_w1_ptr, pid, size_w1, scale, IN_PLACE_W1, ELEMENTS)
    elif pid < end_w2:
        if dw2_ptr is not None:
            scale_matrix(dw2_ptr, out_w2_ptr, pid - end_w1, size_w2, scale, IN_PLACE_W2, ELEMENTS)
    elif pid < end_w3:
        if dw3_ptr is not None:
            scale_matrix(dw3_ptr, out_w3_ptr, pid - end_w2, size_w3, scale, IN_PLACE_W3, ELEMENTS)
    elif pid < end_b1:
        if db1_ptr is not None:
            i_b = pid - end_w3
            scale_sums(db1_ptr, out_b1_ptr, i_b, slots_1, columns_1, scale, SLOTS, COLUMNS)
    elif pid < end_b2:
        if db2_ptr is not None:
            i_b = pid - end_b1
            scale_sums(db2_ptr, out_b2_ptr, i_b, slots_2, columns_2, scale, SLOTS, COLUMNS)
    elif db3_ptr is not None:
        i_b = pid - end_b2
        scale_sums(db3_ptr, out_b3_ptr, i_b, slots_3, columns_3, scale, SLOTS, COLUMNS)


def mean_divisor(
    like: Tensor,
    capacity: int,
    *,
    mean: bool,
    number: float | None = None,
    normalizer: Tensor | None = None,
    weight: Tensor | None = None,
    index: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Return D, 0-d float32 on `like`'s device.

    For a mean, D is `normalizer`, else `number`, else Σ weight, else the count; otherwise it is 1.
    If the count is 0, D is 1. If D would be 0, or if the count exceeds the capacity, D is nan.
    weight: (·,) float32, read at index[i] if there is an index, else at i. count: 0-d int32; None:
    the capacity.
    """
    divisor = like.new_empty((), dtype=torch.float32)
    with on_device(like):
        divisor_kernel[(1,)](
            weight,
            index,
            count,
            normalizer,
            divisor,
            capacity,
            0.0 if number is None else number,
            MEAN=mean,
            NUMBER=number is not None,
            COUNT=count is not None,
            BLOCK=BLOCK,
            num_warps=8,
            **OPTIONS,
        )
    return divisor


def reduce_loss(losses: Tensor, divisor: Tensor, count: Tensor | None = None) -> Tensor:
    """Return Σ losses ÷ divisor, 0-d float32. losses: (capacity,) float32. divisor: 0-d float32.
    count: the losses that take part, 0-d int32; None: all."""
    loss = losses.new_empty(())
    with on_device(losses):
        reduce_kernel[(1,)](
            losses,
            count,
            divisor,
            loss,
            losses.numel(),
            COUNT=count is not None,
            BLOCK=BLOCK,
            num_warps=8,
            **OPTIONS,
        )
    return loss


def scale_gradients(
    matrices: Sequence[Tensor | None],
    sums: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    upstream: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return upstream · (dW1, dW2, dW3, db1, db2, db3) in their dtypes, by one launch.

    matrices: contiguous, in any floating dtype. Without an upstream, a matrix that has its dtype is
    returned as it is. With `in_place` it is scaled where it is: read and written only if upstream
    is not 1. sums: (S, columns) float32, whose rows are added up. upstream: 0-d; None: 1. A None in
    `matrices` or `sums` stays None.
    """
    outs = [
        x
        if x is None or (x.dtype == dtype and (in_place or upstream is None))
        else torch.empty_like(x, dtype=dtype)
        for x, dtype in zip(matrices, dtypes[:3], strict=True)
    ]
    if upstream is None:
        matrices = [None if out is x else x for x, out in zip(matrices, outs, strict=True)]
    some = next((x for x in (*sums, *matrices) if x is not None), None)
    if some is None:
        return (*outs, None, None, None)
    slots, columns = zip(*[(0, 0) if x is None else x.shape for x in sums], strict=True)
    biases = [
        None if x is None else x.new_empty(x.shape[1], dtype=dtype)
        for x, dtype in zip(sums, dtypes[3:], strict=True)
    ]
    sizes = [0 if x is None else x.numel() for x in matrices]
    blocks = [*[cdiv(n, ELEMENTS) for n in sizes], *[cdiv(n, COLUMNS) for n in columns]]
    in_place_1, in_place_2, in_place_3 = [out is x for x, out in zip(matrices, outs, strict=True)]
    with on_device(some):
        scale_kernel[(sum(blocks),)](
            *matrices,
            *sums,
            *outs,
            *biases,
            upstream,
            *blocks[:-1],
            *sizes,
            *slots,
            *columns,
            IN_PLACE_W1=in_place_1,
            IN_PLACE_W2=in_place_2,
            IN_PLACE_W3=in_place_3,
            ELEMENTS=ELEMENTS,
            SLOTS=SLOTS,
            COLUMNS=COLUMNS,
            num_warps=8,
            **OPTIONS,
        )
    return (*outs, *biases)
