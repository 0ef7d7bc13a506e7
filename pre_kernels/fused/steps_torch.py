"""The steps in plain PyTorch: the default on the CPU, and for float64 on every device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..problem import COLUMN_SUMS, Problem
from . import passes
from .products import add_product, linear
from .row_losses import ROW_LOSSES
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

aten = torch.ops.aten

# A chunk has at least this many rows, however small the workspace, because matmuls of fewer rows
# are slow.
MIN_ROWS = 64
# Matmuls of this many rows are nearly as fast per row as larger ones.
FEW_ROWS = 512
# Passes over a chunk handle this many bytes of float32 rows at a time, so that the rows stay in a
# CPU's cache from one pass to the next.
IN_CACHE = 1 << 20

# Each activation has a forward and a backward that write to `out`; the backward takes (dG, Z).
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gelu": (aten.gelu.out, aten.gelu_backward.grad_input),
    "gelu_tanh": (
        partial(aten.gelu.out, approximate="tanh"),
        partial(aten.gelu_backward.grad_input, approximate="tanh"),
    ),
    "silu": (aten.silu.out, aten.silu_backward.grad_input),
    "relu": (aten.relu.out, partial(aten.threshold_backward.grad_input, threshold=0)),
}


class TorchSteps:
    @staticmethod
    def workspace(device: torch.device, dtype: torch.dtype) -> int:
        """Return the most bytes that a chunk's buffers take by default, for products in `dtype`.

        In float32, chunks are free on a CPU. In half precision, several chunks force the matmuls
        for the weights' gradients into float32.
        """
        if device.type != "cpu":
            return 256 << 20
        return (32 if dtype.itemsize > 2 else 512) << 20

    @classmethod
    def layout(cls, problem: Problem) -> Layout:
        d, *inner, z = problem.widths
        hidden = problem.hidden
        dtype = problem.options.dtype
        budget = problem.options.workspace or cls.workspace(hidden.device, dtype)
        rows = budget // ((d + 2 * sum(inner) + z) * dtype.itemsize)
        # Gradients do not fit into float16 until GradScaler's factor is in them.
        narrow = hidden.dtype == torch.float16 and dtype != torch.float16
        spread = problem.loss_dtype if narrow else hidden.dtype
        return Layout(max(MIN_ROWS, rows - rows % MIN_ROWS), (1,) * (len(inner) + 1), spread)

    @staticmethod
    def cut(problem: Problem, layout: Layout, capacity: int) -> int:
        most = layout.rows
        options = problem.options
        if (
            options.workspace is None
            and options.dtype == problem.loss_dtype
            and problem.hidden.device.type == "cpu"
        ):
            # Four chunks have a smaller peak and are as fast.
            most = min(most, max(FEW_ROWS, -(-capacity // 4)))
        return equal_parts(capacity, most, 1)

    @staticmethod
    def select(problem: Problem) -> Selection:
        rows = problem.rows
        if rows is None:
            return Selection(None, None, None, problem.hidden.shape[0])
        # The caller may change the rows before the backward, so they are copied.
        index = rows.nonzero().squeeze(1) if problem.masked else rows.to(torch.long, copy=True)
        return Selection(index, index, None, index.shape[0])

    def __init__(self, work: Work) -> None:
        self.problem = problem = work.problem
        selection = work.selection
        chunk = work.chunk
        self.selection = selection
        self.index = selection.index
        self.losses = work.losses
        self.grads = work.grads
        self.needs_dp = any(grad is not None for grad in self.grads)
        self.layers = problem.parameters()
        self.coefficient = coefficients(work)
        self.weight = None if self.losses is None else row_weights(problem, selection)
        d, *inner, z = problem.widths
        dtype = problem.options.dtype
        accum_dtype = problem.loss_dtype
        hidden = problem.hidden
        dh = self.grads.hidden

        def buffer(rows: int, columns: int, dtype: torch.dtype = dtype) -> Tensor:
            return hidden.new_empty(rows, columns, dtype=dtype)

        # Matmuls of rows that are not contiguous add up one term after another, which doubles the
        # error of small ones.
        as_given = self.index is None and hidden.dtype == dtype and hidden.stride(1) == 1
        normed = problem.options.norm is not None
        self.h = None if as_given and not normed else buffer(chunk, d)
        self.inner = [(buffer(chunk, m), buffer(chunk, m)) for m in inner]
        # With a single chunk dP is no longer needed when dH is written, so P may use dH's memory,
        # unless dH is computed from dP, as in a head of one layer.
        if (
            dh is not None
            and inner
            and dh.dtype == dtype
            and chunk == selection.capacity
            and chunk * z <= dh.numel()
        ):
            self.p = dh.flatten()[: chunk * z].view(chunk, z)
        else:
            self.p = buffer(chunk, z)
        on_cpu = hidden.device.type == "cpu"
        widest = max(*inner, z, d * normed)
        self.block = min(max(MIN_ROWS, IN_CACHE // (4 * widest)), chunk) if on_cpu else chunk
        # Rows of hidden and of their gradients, and the parameters, for the arithmetic of the norm.
        self.wide_x = [buffer(self.block, d, accum_dtype) for _ in range(2 * normed)]
        self.affine = [
            None if x is None else x.to(accum_dtype)
            for x in (problem.norm_weight, problem.norm_bias)
        ]
        self.wide_p = None if accum_dtype == dtype else buffer(self.block, z, accum_dtype)
        self.a = buffer(self.block, z, accum_dtype)

    def _rows(self, start: int, stop: int) -> Tensor:
        """Return the chunk's rows of hidden in the products' dtype."""
        hidden = self.problem.hidden
        if self.h is None:
            return passes.part(hidden, start, stop)
        if self.problem.options.norm is None:
            return passes.take(hidden, self.index, start, stop, self.h)
        self.moments = []
        for first in range(start, stop, self.block):
            last = min(first + self.block, stop)
            rows, *moments = self._normalized(first, last)
            self.moments.append(moments)
            passes.part(self.h, first - start, last - start).copy_(rows)
        return passes.part(self.h, 0, stop - start)

    def _normalized(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Return rows [start, stop) of the selection after the norm, and what `_norm_grad` needs of
        them: the means, which an rms norm has not, and 1 / std, (n, 1) each."""
        x = passes.take(self.problem.hidden, self.index, start, stop, self.wide_x[0])
        eps = self.problem.options.norm_eps
        if self.problem.options.norm == "layer":
            rows: tuple[Tensor, ...] = aten.native_layer_norm(x, x.shape[1:], *self.affine, eps)
            return rows
        square = torch.linalg.vecdot(x, x).unsqueeze(1) / x.shape[1]
        inverse = square.add_(eps).rsqrt_()
        x.mul_(inverse)
        return x if self.affine[0] is None else x.mul_(self.affine[0]), inverse

    def _norm_grad(self, dy: Tensor, start: int, stop: int, moments: Sequence[Tensor]) -> Tensor:
        """Return the gradient of rows [start, stop) of hidden from that of their norm, and add to
        the gradients of scale and shift."""
        x = passes.take(self.problem.hidden, self.index, start, stop, self.wide_x[0])
        dy = passes.part(self.wide_x[1], 0, stop - start).copy_(dy)
        scale, shift = self.affine
        totals = self.grads.norm
        sums: Sequence[Any]
        dx: Tensor
        if self.problem.options.norm == "layer":
            wanted = [self.grads.hidden is not None, *[total is not None for total in totals]]
            dx, *sums = aten.native_layer_norm_backward(
                dy, x, x.shape[1:], *moments, scale, shift, wanted
            )
        else:
            x.mul_(moments[0])
            sums = [None if totals[0] is None else (dy * x).sum(0), None]
            dx = dy if scale is None else dy.mul_(scale)
            dx.addcmul_(x, torch.linalg.vecdot(dx, x).unsqueeze(1) / x.shape[1], value=-1)
            dx.mul_(moments[0])
        for total, part in zip(totals, sums, strict=True):
            if total is not None:
                total[0].copy_(part) if start == 0 else total[0].add_(part)
        return dx

    def project(self, start: int, stop: int) -> None:
        n = stop - start
        self.x = [self._rows(start, stop)]
        self.y = []
        forward, _ = ACTIVATIONS[self.problem.options.activation]
        for (w, b), (z, g) in zip(self.layers[:-1], self.inner, strict=True):
            self.y.append(passes.part(z, 0, n))
            linear(self.x[-1], w, b, self.y[-1])
            self.x.append(forward(self.y[-1], out=passes.part(g, 0, n)))
        self.y.append(passes.part(self.p, 0, n))
        linear(self.x[-1], *self.layers[-1], self.y[-1])

    def row_loss(self, start: int, stop: int) -> None:
        p_rows = self.y[-1]
        bias_grad = self.grads.biases[len(self.layers) - 1]
        options = self.problem.options
        if options.loss == "gram":
            self._gram(start, stop)
            return
        row_loss = ROW_LOSSES[options.loss]
        anchor = self.problem.anchor
        index = None if options.anchor_compact else self.index
        factor = self.coefficient
        for first in range(start, stop, self.block):
            last = min(first + self.block, stop)
            p = passes.part(p_rows, first - start, last - start)
            wide = p if self.wide_p is None else passes.part(self.wide_p, 0, last - first).copy_(p)
            a = passes.take(anchor, index, first, last, self.a)
            losses = row_loss(
                wide, a, self.needs_dp, factor if factor.dim() == 0 else factor[first:last, None]
            )
            if self.losses is not None:
                weight = 1.0 if self.weight is None else self.weight[first:last, None]
                torch.mul(losses, weight, out=self.losses[first:last, None])
            if bias_grad is not None:
                passes.add_rows(bias_grad[0], wide, first == 0)
            if self.needs_dp and wide is not p:
                p.copy_(wide)

    def _gram(self, start: int, stop: int) -> None:
        """The row loss of whole images by their Gram matrices, a tile of one matrix at a time."""
        problem = self.problem
        index = None if problem.options.anchor_compact else self.index
        bias_grad = self.grads.biases[len(self.layers) - 1]
        factor = self.coefficient
        for first, last in images_of(self.selection, start, stop):
            n = last - first
            p_rows = passes.part(self.y[-1], first - start, last - start)
            wide = p_rows.to(problem.loss_dtype)
            norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
            p = wide / norm.clamp_min(GRAM_EPS)
            a = passes.take(problem.anchor, index, first, last, torch.empty_like(p))
            a.div_(torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp_min(GRAM_EPS))
            own = factor if factor.dim() == 0 else factor[first:last]
            tile = max(1, GRAM_ELEMENTS // n)
            for i in range(0, n, tile):
                j = min(i + tile, n)
                d = torch.mm(p[i:j], p.t()).addmm_(a[i:j], a.t(), alpha=-1)
                if self.losses is not None:
                    weight = 1.0 if self.weight is None else self.weight[first + i : first + j]
                    self.losses[first + i : first + j] = torch.linalg.vecdot(d, d) * weight / n
                if not self.needs_dp:
                    continue
                # An element belongs to the losses of its row and of its column.
                pair = 2 * own if own.dim() == 0 else own[i:j, None] + own
                dp = torch.mm(d.mul_(pair).mul_(2 / n), p)
                # Where the length was clamped, it is a constant.
                along = torch.linalg.vecdot(dp, p[i:j]).unsqueeze(1)
                along.masked_fill_(norm[i:j] < GRAM_EPS, 0)
                dp.addcmul_(p[i:j], along, value=-1).div_(norm[i:j].clamp_min(GRAM_EPS))
                if bias_grad is not None:
                    passes.add_rows(bias_grad[0], dp, first + i == 0)
                p_rows[i:j] = dp

    def weight_grad(self, layer: int, start: int, stop: int) -> None:
        total = self.grads.weights[layer]
        assert total is not None
        add_product(total, self.y[layer], self.x[layer], start == 0, copies=True)

    def backproject(self, layer: int, start: int, stop: int) -> None:
        # The gradient of x overwrites x, which is no longer needed.
        dx_rows = torch.mm(self.y[layer], self.layers[layer][0], out=self.x[layer])
        bias_grad = self.grads.biases[layer - 1]
        _, backward = ACTIVATIONS[self.problem.options.activation]
        for first in range(0, stop - start, self.block):
            last = min(first + self.block, stop - start)
            dx, y = passes.part(dx_rows, first, last), passes.part(self.y[layer - 1], first, last)
            backward(dx, y, grad_input=y)
            if bias_grad is not None:
                passes.add_rows(bias_grad[0], y, start + first == 0)

    def input_grads(self, start: int, stop: int) -> None:
        dh = self.grads.hidden
        w1, _ = self.layers[0]
        if self.h is None:
            assert dh is not None
            torch.mm(self.y[0], w1, out=passes.part(dh, start, stop))
            return
        # dH overwrites x, which is no longer needed.
        x = torch.mm(self.y[0], w1, out=self.x[0])
        normed = self.problem.options.norm is not None
        if self.index is None and not normed:
            assert dh is not None
            dh[start:stop].copy_(x)
            return
        if start == 0 and self.index is not None and dh is not None:
            dh.zero_()
        for block, first in enumerate(range(start, stop, self.block)):
            last = min(first + self.block, stop)
            rows = passes.part(x, first - start, last - start)
            if normed:
                rows = self._norm_grad(rows, first, last, self.moments[block])
            if dh is None:
                continue
            if self.index is None:
                dh[first:last].copy_(rows)
            else:
                rows = rows if rows.dtype == dh.dtype else rows.to(dh.dtype)
                dh.index_copy_(0, passes.part(self.index, first, last), rows)

    @staticmethod
    def divisor(problem: Problem, selection: Selection) -> Tensor:
        options = problem.options
        weight = row_weights(problem, selection)
        number: float = 1
        if options.reduction == "mean" and selection.capacity:
            divisor = problem.normalizer
            if divisor is None and options.divisor is None and weight is not None:
                divisor = weight.sum()
            if divisor is not None:
                return torch.where(divisor == 0, torch.nan, divisor)
            number = (
                selection.capacity if options.divisor is None else options.divisor
            ) or torch.nan
        return problem.hidden.new_full((), number, dtype=problem.loss_dtype)

    @staticmethod
    def reduce(selection: Selection, losses: Tensor, divisor: Tensor) -> Tensor:
        return losses.sum() / divisor

    @staticmethod
    def scatter(grads: Gradients, finish: Finish) -> tuple[Tensor | None, Gradients]:
        # `input_grads` has passed dH through the norm already.
        assert grads.hidden is not None
        scale = passes.factor(finish.upstream)
        out = passes.scaled(grads.hidden, scale, finish.dtypes[0], finish.in_place)
        index = finish.scatter_map
        if (
            index is not None
            and scale is not None
            and not (isinstance(scale, float) and math.isfinite(scale))
        ):
            others = index.new_ones(out.shape[0], dtype=torch.bool).index_fill_(0, index, False)
            # The product would leave nan in these rows, because 0 · nan is nan.
            out.masked_fill_(others[:, None], 0)
        return out, grads

    @staticmethod
    def scale(grads: Gradients, finish: Finish) -> tuple[Tensor | None, ...]:
        scale = passes.factor(finish.upstream)
        scaled: list[Tensor | None] = []
        for i, grad in enumerate(grads[1:], 1):
            if grad is None:
                scaled.append(None)
                continue
            # The single row of column sums is their total.
            sums = i in COLUMN_SUMS
            grad = grad[0] if sums else grad
            scaled.append(
                passes.scaled(grad, scale, finish.dtypes[i], finish.in_place and not sums)
            )
        return tuple(scaled)
