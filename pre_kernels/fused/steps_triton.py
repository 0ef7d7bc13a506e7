"""The steps in Triton. Their matmuls read N from the device, so they never make the host wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from .kernels import tiles
from .kernels.activation import apply_activation, apply_activation_grad
from .kernels.common import PROGRAMS, RowShape
from .kernels.finish import mean_divisor, reduce_loss, scale_gradients
from .kernels.matmul import matmul
from .kernels.quantize import Quantized
from .kernels.row_loss import row_loss
from .kernels.rows import gather, invert, scatter, select
from .kernels.weight_grad import add_weight_grad
from .sweep import Gradients, Layout, Selection, Work, equal_parts

# Every chunk but the last has a multiple of this many rows, so that tiles of so many are full.
CHUNK_MULTIPLE = 128


class TritonSteps:
    """Passes over rows between matmuls, all on buffers of one chunk."""

    # The default is 512 MiB of rows (16,384 of width 4,096 in bfloat16), and their column sums.
    workspace = 544 << 20
    # True if rows at or beyond a count that only the device knows must be zero, because the
    # products will read them.
    zero_padding = False

    @staticmethod
    def columns(problem: Problem) -> int:
        """Return how many columns all buffers of a chunk have together."""
        d, m, z = problem.widths
        return 2 * m + z + (d if _copies(problem) else 0)

    @staticmethod
    def fixed_bytes(problem: Problem) -> int:
        """Return the bytes of the workspace that do not grow with a chunk: the partial column
        sums."""
        _, m, z = problem.widths
        return 4 * PROGRAMS * (m + z)

    @classmethod
    def layout(cls, problem: Problem) -> Layout:
        _, m, z = problem.widths
        budget = (problem.options.workspace or cls.workspace) - cls.fixed_bytes(problem)
        rows = max(0, budget) // (cls.columns(problem) * problem.options.dtype.itemsize)
        rows = max(CHUNK_MULTIPLE, rows - rows % CHUNK_MULTIPLE)
        chunk = min(rows, max(1, problem.bound))
        # Under torch.compile the widths may be symbols, which cannot be keys of a cache.
        slots = (RowShape.of(int(m)).programs(chunk), RowShape.of(int(z)).programs(chunk))
        return Layout(rows, slots)

    @staticmethod
    def cut(problem: Problem, layout: Layout, capacity: int) -> int:
        if capacity <= layout.rows:
            return capacity
        d, m, z = problem.widths
        like = problem.hidden
        part = equal_parts(capacity, layout.rows, CHUNK_MULTIPLE)
        tile = tiles.largest(like, problem.options.dtype)
        return tiles.whole_turns(
            capacity, layout.rows, part, (m, z, m, d), tile, tiles.multiprocessors(like)
        )

    @staticmethod
    def select(problem: Problem) -> Selection:
        rows = problem.rows
        total = problem.hidden.shape[0]
        if rows is None:
            return Selection(None, None, None, total)
        if not problem.masked:
            rows = rows.contiguous()
            return Selection(rows, invert(rows, total), None, rows.shape[0])
        if total == 0:
            nothing = rows.new_empty(0, dtype=torch.int32)
            return Selection(nothing, nothing, None, 0)
        if not problem.count_on_host:
            index, scatter_map, count = select(rows.contiguous(), problem.bound)
            return Selection(index, scatter_map, count, problem.bound)
        index, scatter_map, count = select(rows.contiguous(), total)
        capacity = int(count)
        return Selection(index[:capacity], scatter_map, None, capacity)

    def __init__(self, work: Work) -> None:
        self.problem = problem = work.problem
        self.options = problem.options
        self.losses = work.losses
        self.grads = work.grads
        self.index = work.selection.index
        self.count = work.selection.count
        self.w1, self.b1, self.w2, self.b2 = problem.parameters()
        self.factors: dict[str, Any] = {"upstream": work.upstream, "divisor": work.divisor}
        d, m, z = problem.widths

        def buffer(columns: int) -> Tensor:
            return self.w1.new_empty(work.chunk, columns)

        self.z, self.g, self.p = buffer(m), buffer(m), buffer(z)
        self.h = buffer(d) if _copies(problem) else None
        self._prepare()

    def _prepare(self) -> None:
        """Set the weights of the four matmuls that take rows, (N, K) each."""
        self.project_1: Any = self.w1
        self.project_2: Any = self.w2
        self.back_2: Any = self.w2.t()
        self.back_1: Any = self.w1.t()

    def _quantized(self, rows: Tensor) -> Quantized | None:
        """Return the buffer to which the pass that writes `rows` also writes them in lower
        precision, or None."""
        return None

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write x · weightᵀ + bias to out."""
        matmul(x, weight.t(), out, bias=bias, **self.live)

    def _add_product(self, total: Tensor, dy: Tensor, x: Tensor, first: bool) -> None:
        """Compute total += dyᵀ·x, or total = dyᵀ·x if `first`."""
        add_weight_grad(total, dy, x, first=first, **self.live)

    def project(self, start: int, stop: int) -> None:
        n = stop - start
        self.z_rows = _rows(self.z, 0, n)
        self.g_rows = _rows(self.g, 0, n)
        self.p_rows = _rows(self.p, 0, n)
        self.live: dict[str, Any] = {"count": self.count, "start": start}
        hidden = self.problem.hidden
        self.x = _rows(hidden, start, stop) if self.h is None else _rows(self.h, 0, n)
        quantized = self._quantized(self.x)
        if self.h is not None or quantized is not None:
            copy = None if self.h is None else self.x
            gather(
                hidden,
                copy,
                index=self.index,
                zero_padding=self.zero_padding,
                quantized=quantized,
                **self.live,
            )
        self._linear(self.x, self.project_1, self.b1, self.z_rows)
        quantized = self._quantized(self.g_rows)
        # With zero padding every row takes part: a row that is zero in hidden has a finite g.
        count = None if self.zero_padding else self.count
        apply_activation(
            self.z_rows,
            self.g_rows,
            self.options.activation,
            count=count,
            start=start,
            quantized=quantized,
        )

    def row_loss(self, start: int, stop: int) -> None:
        self._linear(self.g_rows, self.project_2, self.b2, self.p_rows)
        indexed = self.index is not None
        needs_dp = any(grad is not None for grad in self.grads)
        row_loss(
            self.p_rows,
            self.problem.anchor,
            self.losses,
            loss=self.options.loss,
            grad=needs_dp,
            index=self.index,
            gather_anchor=indexed and not self.options.anchor_compact,
            weight=self.problem.weight,
            gather_weight=indexed and not self.options.weight_compact,
            sums=self.grads.b2,
            first=start == 0,
            zero_padding=self.zero_padding,
            quantized=self._quantized(self.p_rows) if needs_dp else None,
            **self.factors,
            **self.live,
        )

    def output_grads(self, start: int, stop: int) -> None:
        assert self.grads.w2 is not None
        self._add_product(self.grads.w2, self.p_rows, self.g_rows, start == 0)

    def backproject(self, start: int, stop: int) -> None:
        # dG overwrites g, which is no longer needed.
        self._linear(self.p_rows, self.back_2, None, self.g_rows)
        # With zero padding every row takes part: a row that is zero in dP is zero in dG and dZ.
        count = None if self.zero_padding else self.count
        apply_activation_grad(
            self.g_rows,
            self.z_rows,
            self.options.activation,
            sums=self.grads.b1,
            first=start == 0,
            count=count,
            start=start,
            quantized=self._quantized(self.z_rows),
        )

    def input_grads(self, start: int, stop: int) -> None:
        if self.grads.w1 is not None:
            self._add_product(self.grads.w1, self.z_rows, self.x, start == 0)
        if self.grads.hidden is not None:
            self._linear(self.z_rows, self.back_1, None, _rows(self.grads.hidden, start, stop))

    @staticmethod
    def divisor(problem: Problem, selection: Selection) -> Tensor:
        return mean_divisor(
            problem.hidden,
            selection.capacity,
            mean=problem.options.reduction == "mean",
            number=problem.options.divisor,
            normalizer=problem.normalizer,
            weight=problem.weight,
            index=None if problem.options.weight_compact else selection.index,
            count=selection.count,
        )

    @staticmethod
    def reduce(selection: Selection, losses: Tensor, divisor: Tensor) -> Tensor:
        return reduce_loss(losses, divisor, selection.count)

    @staticmethod
    def scatter(
        dh: Tensor,
        scatter_map: Tensor | None,
        total: int,
        dtype: torch.dtype,
        upstream: Tensor | None,
        in_place: bool,
    ) -> Tensor:
        same = scatter_map is None and dh.dtype == dtype
        if same and upstream is None:
            return dh
        out = dh if same and in_place else dh.new_empty(total, dh.shape[1], dtype=dtype)
        scatter(dh, out, inverse=scatter_map, upstream=upstream)
        return out

    @staticmethod
    def scale(
        grads: Gradients, dtypes: tuple[torch.dtype, ...], upstream: Tensor | None, in_place: bool
    ) -> tuple[Tensor | None, ...]:
        order = (dtypes[0], dtypes[2], dtypes[1], dtypes[3])
        w1, w2, b1, b2 = scale_gradients(
            (grads.w1, grads.w2), (grads.b1, grads.b2), order, upstream, in_place
        )
        return w1, b1, w2, b2


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return rows [start, stop), or the tensor itself if that is all of them: a view costs the host
    about as much as an allocation."""
    return tensor if stop - start == tensor.shape[0] else tensor[start:stop]


def _copies(problem: Problem) -> bool:
    """Whether the chunk's rows of hidden have to be gathered, cast or made contiguous."""
    hidden = problem.hidden
    return (
        problem.rows is not None or hidden.dtype != problem.options.dtype or hidden.stride(1) != 1
    )
