"""What is left when all chunks are done: the loss and its divisor in one launch, the scaled gradients in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, cdiv, narrow, on_device, widen
from .rows import load_scale

BLOCK = 4096  # rows that the one program of the reduction adds at a time
ELEMENTS = 4096  # of a weight's gradient, for a program
SLOTS = 32  # rows of partial column sums added at a time,
COLUMNS = 128  # and columns of a program


@triton.jit(do_not_specialize=["capacity", "number"])
def reduce_kernel(
    losses_ptr,  # (capacity,) float32
    weight_ptr,  # (·,) float32, gathered by index
    index_ptr,  # (capacity,)
    count_ptr,
    normalizer_ptr,  # 0-d
    loss_ptr,  # 0-d float32
    divisor_ptr,  # 0-d float32
    capacity,
    number,
    MEAN: tl.constexpr,
    NUMBER: tl.constexpr,
    GATHER: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = capacity
    if COUNT:
        count = tl.load(count_ptr)
    b_loss = tl.zeros((BLOCK,), tl.float32)
    b_weight = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tl.minimum(count, capacity), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        m_n = rows < tl.minimum(count, capacity)
        b_loss += tl.load(losses_ptr + rows, mask=m_n, other=0.0)
        if MEAN and weight_ptr is not None:
            rows = rows.to(tl.int64)
            if GATHER:
                rows = tl.load(index_ptr + rows, mask=m_n, other=0).to(tl.int64)
            b_weight += tl.load(weight_ptr + rows, mask=m_n, other=0.0)
    loss = tl.sum(b_loss, 0)
    divisor = 1.0
    if MEAN:
        if normalizer_ptr is not None:
            divisor = tl.load(normalizer_ptr).to(tl.float32)
        elif NUMBER:
            divisor = number * 1.0
        elif weight_ptr is not None:
            divisor = tl.sum(b_weight, 0)
        else:
            divisor = count * 1.0
        # an empty batch is 0, not nan; a mean of some rows over nothing is nan
        divisor = tl.where(count == 0, 1.0, tl.where(divisor == 0.0, float("nan"), divisor))
    # rows were dropped: the host does not know, so the numbers have to say it
    divisor = tl.where(count > capacity, float("nan"), divisor)
    tl.store(loss_ptr, loss / divisor)
    tl.store(divisor_ptr, divisor)


@triton.jit
def scale_matrix(x_ptr, out_ptr, pid, size, scale, ELEMENTS: tl.constexpr):
    o_x = pid.to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    b_x = widen(tl.load(x_ptr + o_x, mask=o_x < size, other=0.0)) * scale
    tl.store(out_ptr + o_x, narrow(b_x, out_ptr.dtype.element_ty), mask=o_x < size)


@triton.jit
def scale_sums(sums_ptr, out_ptr, pid, slots, columns, scale, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    o_c = pid * COLUMNS + tl.arange(0, COLUMNS)
    b_sum = tl.zeros((SLOTS, COLUMNS), tl.float32)
    for first in range(0, slots, SLOTS):
        o_s = first + tl.arange(0, SLOTS)
        mask = (o_s < slots)[:, None] & (o_c < columns)[None, :]
        b_sum += tl.load(sums_ptr + o_s[:, None] * columns + o_c[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + o_c, narrow(tl.sum(b_sum, 0) * scale, out_ptr.dtype.element_ty), mask=o_c < columns)


@triton.jit(do_not_specialize=["blocks_w1", "blocks_w2", "blocks_b1", "slots_b1", "slots_b2"])
def scale_kernel(
    dw1_ptr,
    dw2_ptr,
    db1_ptr,  # (slots, columns) float32
    db2_ptr,
    out_w1_ptr,
    out_w2_ptr,
    out_b1_ptr,  # (columns,)
    out_b2_ptr,
    upstream_ptr,
    divisor_ptr,
    blocks_w1,
    blocks_w2,
    blocks_b1,
    size_w1,
    size_w2,
    slots_b1,
    slots_b2,
    columns_b1,
    columns_b2,
    ELEMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One grid over four tensors, one after the other: at small N a launch each would take longer than the work."""
    scale = load_scale(upstream_ptr, divisor_ptr)
    pid = tl.program_id(0)
    if pid < blocks_w1:
        if dw1_ptr is not None:
            scale_matrix(dw1_ptr, out_w1_ptr, pid, size_w1, scale, ELEMENTS)
    elif pid < blocks_w1 + blocks_w2:
        if dw2_ptr is not None:
            scale_matrix(dw2_ptr, out_w2_ptr, pid - blocks_w1, size_w2, scale, ELEMENTS)
    elif pid < blocks_w1 + blocks_w2 + blocks_b1:
        if db1_ptr is not None:
            i_b = pid - blocks_w1 - blocks_w2
            scale_sums(db1_ptr, out_b1_ptr, i_b, slots_b1, columns_b1, scale, SLOTS, COLUMNS)
    elif db2_ptr is not None:
        i_b = pid - blocks_w1 - blocks_w2 - blocks_b1
        scale_sums(db2_ptr, out_b2_ptr, i_b, slots_b2, columns_b2, scale, SLOTS, COLUMNS)


def reduce_loss(
    losses: Tensor,
    *,
    mean: bool,
    number: float | None = None,
    normalizer: Tensor | None = None,
    weight: Tensor | None = None,
    index: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """0-d float32: Σ losses ÷ D, and D. For a mean D is `normalizer`, else `number`, else Σ weight, else the count; D
    is 1 if the count is 0, otherwise nan if D = 0. Both are nan if the count exceeds the capacity.

    losses: (capacity,) float32; weight: (·,) float32, at index[i] if there is an index, else at i; count: 0-d int32,
    None = the capacity.
    """
    loss, divisor = losses.new_empty(()), losses.new_empty(())
    with on_device(losses):
        reduce_kernel[(1,)](
            losses,
            weight,
            index,
            count,
            normalizer,
            loss,
            divisor,
            losses.numel(),
            0.0 if number is None else number,
            MEAN=mean,
            NUMBER=number is not None,
            GATHER=index is not None,
            COUNT=count is not None,
            BLOCK=BLOCK,
            num_warps=8,
            **OPTIONS,
        )
    return loss, divisor


def scale_gradients(
    matrices: tuple[Tensor | None, Tensor | None],
    sums: tuple[Tensor | None, Tensor | None],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
    upstream: Tensor | None = None,
    divisor: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """upstream / divisor · (dW1, dW2, db1, db2) in their dtypes, in one launch.

    matrices: contiguous, any floating dtype, returned as they are if nothing is to be done; sums: (S, columns) float32,
    to be added up; None is passed over.
    """
    unscaled = upstream is None and divisor is None
    ready = [
        x if x is not None and unscaled and x.dtype == dtype else None
        for x, dtype in zip(matrices, dtypes[:2], strict=True)
    ]
    w1, w2 = (None if done is not None else x for x, done in zip(matrices, ready, strict=True))
    given = (w1, w2, *sums)
    some = next((x for x in given if x is not None), None)
    if some is None:
        return (*ready, None, None)
    outs = [
        None if x is None else x.new_empty(x.shape if i < 2 else x.shape[1:], dtype=dtype)
        for i, (x, dtype) in enumerate(zip(given, dtypes, strict=True))
    ]
    blocks = [0 if x is None else cdiv(x.numel(), ELEMENTS) for x in (w1, w2)]
    blocks += [0 if x is None else cdiv(x.shape[1], COLUMNS) for x in sums]
    with on_device(some):
        scale_kernel[(sum(blocks),)](
            *given,
            *outs,
            upstream,
            divisor,
            *blocks[:3],
            *(0 if x is None else x.numel() for x in (w1, w2)),
            *(0 if x is None else x.shape[0] for x in sums),
            *(0 if x is None else x.shape[1] for x in sums),
            ELEMENTS=ELEMENTS,
            SLOTS=SLOTS,
            COLUMNS=COLUMNS,
            num_warps=8,
            **OPTIONS,
        )
    return tuple(out if done is None else done for out, done in zip(outs, (*ready, None, None), strict=True))
