"""The loop over chunks of rows, and the steps that an implementation provides to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import under_autocast
from ..problem import DIFFERENTIABLE, Problem

# A tile of a Gram matrix has about this many elements: 16 MiB in float32.
GRAM_ELEMENTS = 1 << 22
# A shorter row is divided by this instead of its length, as in F.normalize(eps=1e-8).
GRAM_EPS = 1e-8


@dataclass(frozen=True)
class Selection:
    """The rows of hidden that take part. `count` is the N that only the device knows, where the
    host must not wait for it."""

    index: Tensor | None  # (capacity,) flat rows; None: every row in order
    # `scatter` reads this map to put dH back among all rows. For the torch steps it is `index`
    # itself, (capacity,) int64. For the Triton steps it is the inverse, (R,) int32: the position of
    # each row in the selection, or -1 for an unselected row. None: every row in order.
    scatter_map: Tensor | None
    count: Tensor | None  # 0-d int32; None: all `capacity` positions are live
    capacity: int
    images: list[int] | None = None  # the number of rows of each image, for a Gram loss


class Layout(NamedTuple):
    """How a call is split into chunks, from shapes only."""

    rows: int  # the most rows of a chunk
    slots: tuple[int, ...]  # for each layer, rows of the partial sums of its bias's gradient
    # The dtype of a dH that has all rows of hidden, with zeros in unselected rows, after the norm's
    # backward. None: dH has only the selected rows, and the norm's backward is left to `scatter`.
    spread: torch.dtype | None = None


class Gradients(NamedTuple):
    """Sums over the chunks; None for a frozen tensor. The rows of a bias gradient (slots, width)
    add up to the gradient, and so do those of the norm's scale and shift."""

    # (capacity, d), compact, also where only the norm needs it; or (R, d), in hidden's order
    hidden: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    w3: Tensor | None
    b3: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        return self[1:7:2]

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        return self[2:7:2]

    @property
    def norm(self) -> tuple[Tensor | None, ...]:
        return self[7:]

    def before(self, layer: int) -> bool:
        """Whether hidden, the norm, or a weight or bias of a layer before this one, has a
        gradient."""
        return True in [grad is not None for grad in self[: 2 * layer + 1] + self[7:]]


class Finish(NamedTuple):
    """How the sums of a sweep become the gradients that autograd takes."""

    scatter_map: Tensor | None
    total: int | None  # the rows of dH; None: it is not wanted
    dtypes: Sequence[torch.dtype]  # those of hidden, w1, b1, ..., norm_bias
    upstream: Tensor | None  # 0-d; None: the sums have it already
    in_place: bool  # whether the memory of the sums may be used
    # For the backward of the norm, where `scatter` does it.
    hidden: Tensor | None  # (R, d)
    norm_weight: Tensor | None
    norm: str | None
    norm_eps: float


class Work(NamedTuple):
    """One sweep over a selection."""

    problem: Problem
    selection: Selection
    chunk: int  # the rows of the largest chunk
    losses: Tensor | None  # (capacity,)
    grads: Gradients
    divisor: Tensor  # 0-d
    upstream: Tensor | None  # 0-d or (capacity,); None: 1


class Steps(Protocol):
    """The interface of an implementation.

    An instance is one sweep: its workspace, and the operations on a chunk of rows [start, stop) of
    the selection. They are called in the order in which they are defined here.
    """

    @staticmethod
    def layout(problem: Problem) -> Layout: ...

    @staticmethod
    def cut(problem: Problem, layout: Layout, capacity: int) -> int:
        """Return the rows of each chunk of the selection. The last chunk takes the rest."""
        ...

    @staticmethod
    def select(problem: Problem) -> Selection: ...

    def __init__(self, work: Work) -> None: ...

    def project(self, start: int, stop: int) -> None:
        """Gather the rows X of hidden, normalised if there is a norm. Compute Y = X·Wᵀ + b for each
        layer, where the X of the next layer is act(Y). The last Y is P."""

    def row_loss(self, start: int, stop: int) -> None:
        """Compute losses[start:stop] = w·ℓ, dY = upstream / divisor · w · dℓ/dP of the last layer,
        and its bias's gradient += Σ dY. For a Gram loss the chunk holds whole images."""

    def weight_grad(self, layer: int, start: int, stop: int) -> None:
        """Compute the weight's gradient of a layer += dYᵀ·X. The first chunk stores this sum
        instead of adding, as it does all sums."""

    def backproject(self, layer: int, start: int, stop: int) -> None:
        """From the dY of a layer compute that of the layer before, (dY·W) ⊙ act'(Y), and its bias's
        gradient += Σ dY."""

    def input_grads(self, start: int, stop: int) -> None:
        """Write dY·W of the first layer to the chunk's rows of grads.hidden. If the layout spreads
        dH, that is after the backward of the norm, which adds to the norm's gradients."""

    @staticmethod
    def divisor(problem: Problem, selection: Selection) -> Tensor:
        """Return the D of the reduction, 0-d. It is 1 for "sum" and if N = 0 (so that an empty
        batch gives 0), and nan if D = 0 otherwise."""
        ...

    @staticmethod
    def reduce(selection: Selection, losses: Tensor, divisor: Tensor) -> Tensor:
        """Return Σ losses ÷ divisor."""
        ...

    @staticmethod
    def scatter(grads: Gradients, finish: Finish) -> tuple[Tensor | None, Gradients]:
        """Return upstream · grads.hidden as a (total, d) tensor with zeros in unselected rows,
        after the norm's backward if there is a norm, and the gradients with the sums of that
        backward. With `in_place` the tensor is grads.hidden itself if shape and dtype match."""
        ...

    @staticmethod
    def scale(grads: Gradients, finish: Finish) -> tuple[Tensor | None, ...]:
        """Return upstream · (w1, b1, ..., norm_bias), with column sums added up. With `in_place` a
        matrix that has its dtype is scaled where it is."""
        ...


def equal_parts(rows: int, most: int, chunk_multiple: int) -> int:
    """Return the rows of a chunk: as few chunks as `most` allows, and all but the last of one size.

    Every chunk but the last has a multiple of `chunk_multiple` rows; so must `most`.
    """
    part = -(-rows // -(-rows // most))
    return min(rows, -(-part // chunk_multiple) * chunk_multiple)


def allocate(problem: Problem, layout: Layout, capacity: int, wanted: list[bool]) -> Gradients:
    """Allocate the sums. Over several chunks a weight's gradient is summed in float32, because
    bfloat16 would round the sum again in every chunk. One chunk does not need a sum."""
    accum_dtype = problem.loss_dtype
    dtype = problem.options.dtype
    weights = dtype if problem.bound <= layout.rows else accum_dtype

    def room(want: bool, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        return problem.hidden.new_empty(rows, columns, dtype=dtype) if want else None

    total, d = problem.hidden.shape
    rows, dh_dtype = (total, layout.spread) if layout.spread else (capacity, dtype)
    # Without a spread the sums for the norm stay empty: `scatter` makes them, from dH.
    norm = [room(want, 1 if layout.spread else 0, d, accum_dtype) for want in wanted[7:]]
    want_dh = wanted[0] or (not layout.spread and True in wanted[7:])
    grads = [room(want_dh, rows, d, dh_dtype)]
    for (w, b), slots in zip(problem.layers, layout.slots, strict=True):
        want_w, want_b = wanted[len(grads) : len(grads) + 2]
        grads.append(room(want_w, w.shape[0], w.shape[1], weights))
        grads.append(room(want_b and b is not None, slots, w.shape[0], accum_dtype))
    return Gradients(*grads, *[None] * (DIFFERENTIABLE - 2 - len(grads)), *norm)


def chunks(
    steps: type[Steps], problem: Problem, layout: Layout, selection: Selection
) -> list[tuple[int, int]]:
    """Return the rows [start, stop) of each chunk of a selection that is not empty. For a Gram loss
    these are whole images, and more than `layout.rows` only where one image has more."""
    capacity = selection.capacity
    if selection.images is None:
        rows = steps.cut(problem, layout, capacity)
        return [(start, min(start + rows, capacity)) for start in range(0, capacity, rows)]
    spans = [(0, 0)]
    for size in selection.images:
        start, stop = spans[-1]
        if stop > start and stop + size - start > layout.rows:
            spans.append((stop, stop + size))
        else:
            spans[-1] = (start, stop + size)
    return spans


def images_of(selection: Selection, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the rows of each image in the chunk [start, stop)."""
    assert selection.images is not None
    ends = list(accumulate(selection.images))
    spans = zip([0, *ends], ends, strict=False)
    return [(first, last) for first, last in spans if start <= first < stop]


def row_weights(problem: Problem, selection: Selection) -> Tensor | None:
    """Return the row weights (capacity,) in the order of the selection."""
    if problem.weight is None or problem.options.weight_compact or selection.index is None:
        return problem.weight
    return problem.weight[selection.index]


def coefficients(work: Work) -> Tensor:
    """Return the factors of the rows' derivatives, weight · upstream / divisor: (capacity,), or
    0-d."""
    weight = row_weights(work.problem, work.selection)
    scale = work.divisor.reciprocal() if work.upstream is None else work.upstream / work.divisor
    return scale if weight is None else scale * weight


def sweep(
    steps: type[Steps],
    problem: Problem,
    selection: Selection,
    wanted: list[bool],
    losses: Tensor | None,
    divisor: Tensor,
    upstream: Tensor | None = None,
) -> Gradients:
    """Pass once over the selected rows, chunk by chunk; write the losses and return the summed
    gradients."""
    layout = steps.layout(problem)
    capacity = selection.capacity
    grads = allocate(problem, layout, capacity, wanted)
    if capacity == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    spans = chunks(steps, problem, layout, selection)
    chunk = max(stop - start for start, stop in spans)
    device = problem.hidden.device.type
    # Autocast has already set the products' dtype. It is turned off only where it is on, because
    # entering the context costs the host as much as a launch.
    with torch.autocast(device, enabled=False) if under_autocast(device) else nullcontext():
        run = steps(Work(problem, selection, chunk, losses, grads, divisor, upstream))
        for span in spans:
            run.project(*span)
            run.row_loss(*span)
            for layer in reversed(range(len(layout.slots))):
                if grads.weights[layer] is not None:
                    run.weight_grad(layer, *span)
                if not grads.before(layer):
                    break
                if layer:
                    run.backproject(layer, *span)
                else:
                    run.input_grads(*span)
    return grads
