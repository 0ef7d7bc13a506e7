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
from .kernels.gram import gram_rows
from .kernels.matmul import matmul
from .kernels.norm import scatter_norm
from .kernels.quantize import Quantized
from .kernels.row_loss import row_loss
from .kernels.rows import gather, invert, scatter, select
from .kernels.weight_grad import add_weight_grad
from .products import wide_product
from .sweep import (
    GRAM_ELEMENTS,
    GRAM_EPS,
    Finish,
    Gradients,
    Layout,
    Selection,
    Work,
    coefficients,
    equal_parts,
    images_of,
    row_weights,
)

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
        d, *inner, z = problem.widths
        return 2 * sum(inner) + z + (d if _copies(problem) else 0)

    @staticmethod
    def fixed_bytes(problem: Problem) -> int:
        """Return the bytes of the workspace that do not grow with a chunk: the partial column
        sums."""
        return 4 * PROGRAMS * sum(problem.widths[1:])

    @classmethod
    def layout(cls, problem: Problem) -> Layout:
        budget = (problem.options.workspace or cls.workspace) - cls.fixed_bytes(problem)
        rows = max(0, budget) // (cls.columns(problem) * problem.options.dtype.itemsize)
        rows = max(CHUNK_MULTIPLE, rows - rows % CHUNK_MULTIPLE)
        chunk = min(rows, max(1, problem.bound))
        # Under torch.compile the widths may be symbols, which cannot be keys of a cache.
        slots = [RowShape.of(int(width)).programs(chunk) for width in problem.widths[1:]]
        return Layout(rows, tuple(slots))

    @staticmethod
    def cut(problem: Problem, layout: Layout, capacity: int) -> int:
        if capacity <= layout.rows:
            return capacity
        widths = problem.widths
        like = problem.hidden
        part = equal_parts(capacity, layout.rows, CHUNK_MULTIPLE)
        tile = tiles.largest(like, problem.options.dtype)
        # These are the output widths of the matmuls that take rows, forward and backward.
        outputs = (*widths[1:], *widths[-2::-1])
        return tiles.whole_turns(
            capacity, layout.rows, part, outputs, tile, tiles.multiprocessors(like)
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
        self.selection = work.selection
        self.index = work.selection.index
        self.count = work.selection.count
        self.layers = problem.parameters()
        self.factors: dict[str, Any] = {"upstream": work.upstream, "divisor": work.divisor}
        if self.options.loss == "gram":
            self.coefficient = coefficients(work)
            self.weight = row_weights(problem, work.selection)
        d, *inner, z = problem.widths
        like = self.layers[0][0]

        def buffer(columns: int) -> Tensor:
            return like.new_empty(work.chunk, columns)

        self.inner = [(buffer(m), buffer(m)) for m in inner]
        self.p = buffer(z)
        self.h = buffer(d) if _copies(problem) else None
        # Each layer's weight (N, K) in the matmuls that take rows, forward and backward.
        self.forward, self.back = self._weights()

    def _weights(self) -> tuple[list[Any], list[Any]]:
        return [w for w, _ in self.layers], [w.t() for w, _ in self.layers]

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
        self.live: dict[str, Any] = {"count": self.count, "start": start}
        hidden = self.problem.hidden
        x = _rows(hidden, start, stop) if self.h is None else _rows(self.h, 0, n)
        quantized = self._quantized(x)
        if self.h is not None or quantized is not None:
            copy = None if self.h is None else x
            gather(
                hidden,
                copy,
                index=self.index,
                zero_padding=self.zero_padding,
                quantized=quantized,
                norm=self.options.norm,
                eps=self.options.norm_eps,
                weight=self.problem.norm_weight,
                bias=self.problem.norm_bias,
                **self.live,
            )
        self.x, self.y = [x], []
        # With zero padding every row takes part: a row that is zero in hidden has a finite g.
        count = None if self.zero_padding else self.count
        for layer, (z, g) in enumerate(self.inner):
            y, x = _rows(z, 0, n), _rows(g, 0, n)
            self._linear(self.x[layer], self.forward[layer], self.layers[layer][1], y)
            apply_activation(
                y,
                x,
                self.options.activation,
                count=count,
                start=start,
                quantized=self._quantized(x),
            )
            self.y.append(y)
            self.x.append(x)
        self.y.append(_rows(self.p, 0, n))
        self._linear(self.x[-1], self.forward[-1], self.layers[-1][1], self.y[-1])

    def row_loss(self, start: int, stop: int) -> None:
        if self.options.loss == "gram":
            self._gram(start, stop)
            return
        p_rows = self.y[-1]
        indexed = self.index is not None
        needs_dp = any(grad is not None for grad in self.grads)
        row_loss(
            p_rows,
            self.problem.anchor,
            self.losses,
            loss=self.options.loss,
            grad=needs_dp,
            index=self.index,
            gather_anchor=indexed and not self.options.anchor_compact,
            weight=self.problem.weight,
            gather_weight=indexed and not self.options.weight_compact,
            sums=self.grads.biases[len(self.layers) - 1],
            first=start == 0,
            zero_padding=self.zero_padding,
            quantized=self._quantized(p_rows) if needs_dp else None,
            **self.factors,
            **self.live,
        )

    def _gram(self, start: int, stop: int) -> None:
        """The row loss of whole images by their Gram matrices, a tile of one matrix at a time.

        The matrices are float32, because their difference is what counts. The kernels for matmuls
        have no tile for float32 results of half-precision rows, so these matmuls are the vendor's.
        """
        anchor = self.problem.anchor
        index = None if self.options.anchor_compact else self.index
        needs_dp = any(grad is not None for grad in self.grads)
        bias_sums = self.grads.biases[len(self.layers) - 1]
        for first, last in images_of(self.selection, start, stop):
            n = last - first
            p = self.y[-1][first - start : last - start]
            unit_p, unit_a = torch.empty_like(p), torch.empty_like(p)
            gather(p, unit_p, norm="unit", eps=GRAM_EPS)
            gather(anchor, unit_a, index=index, start=first, norm="unit", eps=GRAM_EPS)
            factor, weight, losses = (
                x if x is None or x.dim() == 0 else x[first:last]
                for x in (self.coefficient, self.weight, self.losses)
            )
            assert factor is not None
            tile = max(1, GRAM_ELEMENTS // n)
            for i in range(0, n, tile):
                j = min(i + tile, n)
                s, t = (wide_product(x[i:j], x) for x in (unit_p, unit_a))
                e = p.new_empty(s.shape) if needs_dp else None
                gram_rows(s, t, e, losses, weight=weight, factor=factor, row=i)
                if e is not None:
                    dp = torch.mm(e, unit_p)
                    scatter_norm(dp, p[i:j], p[i:j], norm="unit", eps=GRAM_EPS)
        if bias_sums is not None:
            if start == 0:
                bias_sums.zero_()
            bias_sums[0] += self.y[-1].sum(0, dtype=bias_sums.dtype)

    def weight_grad(self, layer: int, start: int, stop: int) -> None:
        total = self.grads.weights[layer]
        assert total is not None
        self._add_product(total, self.y[layer], self.x[layer], start == 0)

    def backproject(self, layer: int, start: int, stop: int) -> None:
        # The gradient of x overwrites x, which is no longer needed.
        self._linear(self.y[layer], self.back[layer], None, self.x[layer])
        y = self.y[layer - 1]
        # With zero padding every row takes part: a row that is zero in dP is zero in dG and dZ.
        count = None if self.zero_padding else self.count
        apply_activation_grad(
            self.x[layer],
            y,
            self.options.activation,
            sums=self.grads.biases[layer - 1],
            first=start == 0,
            count=count,
            start=start,
            quantized=self._quantized(y),
        )

    def input_grads(self, start: int, stop: int) -> None:
        assert self.grads.hidden is not None
        self._linear(self.y[0], self.back[0], None, _rows(self.grads.hidden, start, stop))

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
    def scatter(grads: Gradients, finish: Finish) -> tuple[Tensor | None, Gradients]:
        scatter_map, total, (dtype, *_), upstream, in_place, hidden, weight, norm, eps = finish
        dh = grads.hidden
        assert dh is not None
        same = scatter_map is None and dh.dtype == dtype
        if same and upstream is None and norm is None:
            return dh, grads
        d = dh.shape[1]
        out, sums = None, None
        if total is not None:
            out = dh if same and in_place else dh.new_empty(total, d, dtype=dtype)
        places = {"inverse": scatter_map, "upstream": upstream}
        if norm is None or hidden is None:
            assert out is not None
            scatter(dh, out, **places)
            return out, grads
        if True in [x is not None for x in grads.norm]:
            programs = RowShape.of(d).programs(hidden.shape[0])
            sums = dh.new_empty(2, programs, d, dtype=torch.float32)
            wanted = [None if x is None else sums[i] for i, x in enumerate(grads.norm)]
            grads = Gradients(*grads[:7], *wanted)
        scatter_norm(dh, hidden, out, norm=norm, eps=eps, weight=weight, sums=sums, **places)
        return out, grads

    @staticmethod
    def scale(grads: Gradients, finish: Finish) -> tuple[Tensor | None, ...]:
        dtypes, upstream = finish.dtypes, finish.upstream
        order = (*dtypes[1:7:2], *dtypes[2:7:2])
        w1, w2, w3, b1, b2, b3 = scale_gradients(
            grads.weights, grads.biases, order, upstream, finish.in_place
        )
        norm = grads.norm
        if True in [x is not None for x in norm]:
            more = (*order[:3], *dtypes[7:], order[0])
            norm = scale_gradients((None,) * 3, (*norm, None), more, upstream)[3:5]
        return w1, b1, w2, b2, w3, b3, *norm


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return rows [start, stop), or the tensor itself if that is all of them: a view costs the host
    about as much as an allocation."""
    return tensor if stop - start == tensor.shape[0] else tensor[start:stop]


def _copies(problem: Problem) -> bool:
    """Whether the chunk's rows of hidden have to be gathered, normalised, cast or made
    contiguous."""
    hidden = problem.hidden
    return (
        problem.rows is not None
        or problem.options.norm is not None
        or hidden.dtype != problem.options.dtype
        or hidden.stride(1) != 1
    )
