"""The loop over chunks of rows, and the steps that an implementation of it provides."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import under_autocast
from ..problem import Problem


@dataclass(frozen=True)
class Selection:
    """Which rows of hidden take part. `count` is the device's own N where the host must not wait
    for it."""

    index: Tensor | None  # (capacity,) flat rows; None = every row in order
    # What the implementation's `scatter` reads to put dH back among all rows: the torch steps read
    # `index` itself, (capacity,) int64; the Triton steps read its inverse, (R,) int32, the position
    # of each row in the selection and -1 where it has none. None = every row in order.
    scatter_map: Tensor | None
    count: Tensor | None  # 0-d int32; None = all `capacity` positions are live
    capacity: int


class Layout(NamedTuple):
    """How a call is cut, by shapes alone."""

    rows: int  # of a chunk at most
    slots: tuple[int, int]  # rows of the partial column sums of dZ and of dP
    # The dtype of a dH that has all rows of hidden, zero where a row is not selected. None: dH has
    # the selected rows alone.
    spread: torch.dtype | None = None


class Gradients(NamedTuple):
    """Sums over the chunks; None where frozen. Biases: (slots, width), whose rows add up to the
    gradient."""

    hidden: Tensor | None  # (capacity, d), compact; or (R, d), as hidden lies
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None


class Work(NamedTuple):
    """One sweep over a selection."""

    problem: Problem
    selection: Selection
    chunk: int  # rows at most
    losses: Tensor | None  # (capacity,)
    grads: Gradients
    divisor: Tensor  # 0-d
    upstream: Tensor | None  # 0-d or (capacity,); None = 1


class Steps(Protocol):
    """What an implementation provides. An instance is one sweep: its workspace, and the operations
    on a chunk of rows [start, stop) of the selection, called in the order in which they stand
    here."""

    @staticmethod
    def layout(problem: Problem) -> Layout: ...

    @staticmethod
    def cut(problem: Problem, layout: Layout, capacity: int) -> int:
        """Rows of each chunk of the selection, but for the last, which takes what is left."""
        ...

    @staticmethod
    def select(problem: Problem) -> Selection: ...

    def __init__(self, work: Work) -> None: ...

    def project(self, start: int, stop: int) -> None:
        """Z = H·W1ᵀ + b1 and G = act(Z)."""

    def row_loss(self, start: int, stop: int) -> None:
        """P = G·W2ᵀ + b2; losses[start:stop] = w·ℓ; dP = upstream / divisor · w · dℓ/dP and
        grads.b2 += Σ dP."""

    def output_grads(self, start: int, stop: int) -> None:
        """grads.w2 += dPᵀ·G; stored, not added, in the first chunk, as all sums are."""

    def backproject(self, start: int, stop: int) -> None:
        """dZ = (dP·W2) ⊙ act'(Z) and grads.b1 += Σ dZ."""

    def input_grads(self, start: int, stop: int) -> None:
        """grads.w1 += dZᵀ·H, and dZ·W1 in the rows of grads.hidden that belong to the chunk."""

    @staticmethod
    def divisor(problem: Problem, selection: Selection) -> Tensor:
        """The D of the reduction, 0-d; 1 for "sum" and if N = 0 (an empty batch is 0), otherwise
        nan if D = 0."""
        ...

    @staticmethod
    def reduce(selection: Selection, losses: Tensor, divisor: Tensor) -> Tensor:
        """Σ losses ÷ divisor."""
        ...

    @staticmethod
    def scatter(
        dh: Tensor,
        scatter_map: Tensor | None,
        total: int,
        dtype: torch.dtype,
        upstream: Tensor | None,
        in_place: bool,
    ) -> Tensor:
        """upstream · dh as a (total, d) tensor in `dtype`, zero where a row is not selected;
        `in_place`: dh itself, if it is of that shape and dtype."""
        ...

    @staticmethod
    def scale(
        grads: Gradients, dtypes: tuple[torch.dtype, ...], upstream: Tensor | None, in_place: bool
    ) -> tuple[Tensor | None, ...]:
        """upstream · (w1, b1, w2, b2) in `dtypes`, column sums added up; `in_place`: a matrix of
        that dtype itself."""
        ...


def equal_parts(rows: int, most: int, chunk_multiple: int) -> int:
    """The rows of a chunk: as few chunks as `most` rows allow, all but the last of one size.

    Every chunk but the last has a multiple of `chunk_multiple` rows; `most` has to be one too.
    """
    part = -(-rows // -(-rows // most))
    return min(rows, -(-part // chunk_multiple) * chunk_multiple)


def allocate(problem: Problem, layout: Layout, capacity: int, wanted: list[bool]) -> Gradients:
    """Room for the sums. Over several chunks a weight's gradient is summed in float32: in bfloat16
    every chunk would round the sum again. One chunk needs no sum."""
    accum_dtype = problem.loss_dtype
    dtype = problem.options.dtype
    d, m, z = problem.widths
    weights = dtype if problem.bound <= layout.rows else accum_dtype

    def room(want: bool, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        return problem.hidden.new_empty(rows, columns, dtype=dtype) if want else None

    return Gradients(
        room(wanted[0], problem.hidden.shape[0], d, layout.spread)
        if layout.spread
        else room(wanted[0], capacity, d, dtype),
        room(wanted[1], m, d, weights),
        room(wanted[2] and problem.b1 is not None, layout.slots[0], m, accum_dtype),
        room(wanted[3], z, m, weights),
        room(wanted[4] and problem.b2 is not None, layout.slots[1], z, accum_dtype),
    )


def sweep(
    steps: type[Steps],
    problem: Problem,
    selection: Selection,
    wanted: list[bool],
    losses: Tensor | None,
    divisor: Tensor,
    upstream: Tensor | None = None,
) -> Gradients:
    """One pass over the selected rows, chunk by chunk: the losses, and the gradients summed."""
    layout = steps.layout(problem)
    capacity = selection.capacity
    grads = allocate(problem, layout, capacity, wanted)
    if capacity == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    chunk = steps.cut(problem, layout, capacity)
    device = problem.hidden.device.type
    # Autocast has done its part in the products' dtype. It is turned off only where it is on, since
    # entering the context takes the host as long as a launch.
    with torch.autocast(device, enabled=False) if under_autocast(device) else nullcontext():
        run = steps(Work(problem, selection, chunk, losses, grads, divisor, upstream))
        for start in range(0, capacity, chunk):
            span = (start, min(start + chunk, capacity))
            run.project(*span)
            run.row_loss(*span)
            if grads.w2 is not None:
                run.output_grads(*span)
            if not (grads.hidden is None and grads.w1 is None and grads.b1 is None):
                run.backproject(*span)
                run.input_grads(*span)
    return grads
