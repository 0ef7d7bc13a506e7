"""The steps in plain PyTorch: the default on the CPU, and for float64 everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .checks import Problem
from .products import add_product, linear
from .sweep import Gradients, Layout, Selection, Work, equal_parts

aten = torch.ops.aten

MIN_ROWS = 64  # of a chunk, however small the workspace; fewer make poor products
ROWS_IN_CACHE = 256  # the row loss makes several passes over float32 copies of that many rows

# (forward, backward) into `out`; the backward takes (dG, Z)
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gelu": (aten.gelu.out, aten.gelu_backward.grad_input),
    "gelu_tanh": (
        partial(aten.gelu.out, approximate="tanh"),
        partial(aten.gelu_backward.grad_input, approximate="tanh"),
    ),
    "silu": (aten.silu.out, aten.silu_backward.grad_input),
    "relu": (aten.relu.out, partial(aten.threshold_backward.grad_input, threshold=0)),
}


def _cosine(p: Tensor, a: Tensor, grad: bool, coefficient: Tensor | float) -> Tensor:
    """-cos; as in `F.cosine_similarity` both norms are clamped at eps, and the derivative of p's norm is not."""
    norm = torch.linalg.vector_norm(p, dim=1, keepdim=True)
    p_norm = norm.clamp_min(1e-8)
    p.div_(p_norm)
    a = a / torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp_min(1e-8)
    # a/|a| = near · p/|p| + r, where little of p is left in r: its part is known to the rounding of r, not of 1
    near = torch.linalg.vecdot(p, a).unsqueeze(1)
    r = a.sub_(near * p)
    part, square = (torch.linalg.vecdot(p, x).unsqueeze(1) for x in (r, p))
    cosine = near * square + part
    if grad:
        # d(-cos)/dp = (cos · p/|p| - a/|a|) / |p|
        along = torch.where(norm < p_norm, cosine * (p_norm / norm) - near, part)
        p.mul_(along.masked_fill_(norm == 0, 0)).sub_(r).mul_(coefficient / p_norm)
    return -cosine


def _mse(p: Tensor, a: Tensor, grad: bool, coefficient: Tensor | float) -> Tensor:
    p.sub_(a)
    loss = torch.linalg.vecdot(p, p).unsqueeze(1) / p.shape[1]
    if grad:
        p.mul_(coefficient * (2 / p.shape[1]))
    return loss


def _smooth_l1(p: Tensor, a: Tensor, grad: bool, coefficient: Tensor | float) -> Tensor:
    p.sub_(a)
    slope = p.clamp(-1, 1)
    loss = torch.linalg.vecdot(slope, p.sub_(slope, alpha=0.5)).unsqueeze(1) / p.shape[1]
    if grad:
        torch.mul(slope, coefficient * (1 / p.shape[1]), out=p)
    return loss


# (n, 1) losses of float32 (or wider) rows; with `grad`, p becomes coefficient · dℓ/dp
ROW_LOSSES = {"cosine": _cosine, "mse": _mse, "smooth_l1": _smooth_l1}


class TorchSteps:
    workspace = {"cpu": 32 << 20, "cuda": 256 << 20}  # noqa: RUF012  bytes; on the CPU a chunk should stay in the cache

    @staticmethod
    def layout(problem: Problem) -> Layout:
        d, m, z = problem.widths
        budget = problem.options.workspace or TorchSteps.workspace.get(problem.hidden.device.type, 256 << 20)
        rows = budget // ((d + 2 * m + z) * problem.options.dtype.itemsize)
        return Layout(max(MIN_ROWS, rows - rows % MIN_ROWS), (1, 1))

    @staticmethod
    def cut(problem: Problem, layout: Layout, capacity: int) -> int:
        return equal_parts(capacity, layout.rows, 1)

    @staticmethod
    def select(problem: Problem) -> Selection:
        rows = problem.rows
        if rows is None:
            return Selection(None, None, None, problem.hidden.shape[0])
        # a copy: the caller may reuse the tensor before the backward
        index = rows.nonzero().squeeze(1) if problem.masked else rows.to(torch.long, copy=True)
        return Selection(index, index, None, index.shape[0])

    def __init__(self, work: Work) -> None:
        problem, selection, chunk = work.problem, work.selection, work.chunk
        self.problem, self.index, self.losses, self.grads = problem, selection.index, work.losses, work.grads
        self.needs_dp = any(grad is not None for grad in self.grads)
        self.w1, self.b1, self.w2, self.b2 = problem.parameters()
        self.coefficient = _coefficient(problem, selection, work.upstream, work.divisor)
        self.weight = None if self.losses is None else _weight(problem, selection)
        (d, m, z), dtype, wide = problem.widths, problem.options.dtype, problem.loss_dtype

        def buffer(rows: int, columns: int, dtype: torch.dtype = dtype) -> Tensor:
            return problem.hidden.new_empty(rows, columns, dtype=dtype)

        self.z, self.g, self.p = (buffer(chunk, columns) for columns in (m, m, z))
        # products of rows that are no rows in memory add up one term after another: small ones are twice as wrong
        as_given = self.index is None and problem.hidden.dtype == dtype and problem.hidden.stride(1) == 1
        self.h = None if as_given else buffer(chunk, d)
        on_cpu = problem.hidden.device.type == "cpu"
        self.block = min(ROWS_IN_CACHE, chunk) if on_cpu else chunk  # rows of one pass of the row loss
        self.wide_p = None if wide == dtype else buffer(self.block, z, wide)

    def _rows(self, start: int, stop: int) -> Tensor:
        """The chunk's rows of hidden in the products' dtype."""
        hidden, n = self.problem.hidden, stop - start
        if self.h is None:
            return hidden[start:stop]
        if self.index is None:
            return self.h[:n].copy_(hidden[start:stop])
        if hidden.dtype == self.h.dtype:
            return torch.index_select(hidden, 0, self.index[start:stop], out=self.h[:n])
        return self.h[:n].copy_(hidden.index_select(0, self.index[start:stop]))

    def _anchor(self, start: int, stop: int) -> Tensor:
        anchor = self.problem.anchor
        if self.problem.options.anchor_compact or self.index is None:
            rows = anchor[start:stop]
        else:
            rows = anchor.index_select(0, self.index[start:stop])
        return rows.to(self.problem.loss_dtype)

    def project(self, start: int, stop: int) -> None:
        n = stop - start
        self.x = self._rows(start, stop)
        self.z_rows, self.g_rows, self.p_rows = self.z[:n], self.g[:n], self.p[:n]
        linear(self.x, self.w1, self.b1, self.z_rows)
        forward, _ = ACTIVATIONS[self.problem.options.activation]
        forward(self.z_rows, out=self.g_rows)

    def row_loss(self, start: int, stop: int) -> None:
        linear(self.g_rows, self.w2, self.b2, self.p_rows)
        row_loss = ROW_LOSSES[self.problem.options.loss]
        for first in range(start, stop, self.block):
            last = min(first + self.block, stop)
            p = self.p_rows[first - start : last - start]
            wide = p if self.wide_p is None else self.wide_p[: last - first].copy_(p)
            factor = self.coefficient[first:last, None]
            losses = row_loss(wide, self._anchor(first, last), self.needs_dp, factor)
            if self.losses is not None:
                weight = 1.0 if self.weight is None else self.weight[first:last, None]
                torch.mul(losses, weight, out=self.losses[first:last, None])
            if self.needs_dp and wide is not p:
                p.copy_(wide)
        if self.grads.b2 is not None:
            self._add_rows(self.grads.b2[0], self.p_rows, start == 0)

    def _add_rows(self, total: Tensor, y: Tensor, first: bool) -> None:
        """total += Σ y; the CPU sums half precision in float32 through a copy, which should stay in the cache."""
        if first:
            total.zero_()
        for rows in y.split(ROWS_IN_CACHE) if y.device.type == "cpu" else [y]:
            total.add_(rows.sum(0, dtype=total.dtype))

    def output_grads(self, start: int, stop: int) -> None:
        assert self.grads.w2 is not None
        add_product(self.grads.w2, self.p_rows, self.g_rows, start == 0, copies=True)

    def backproject(self, start: int, stop: int) -> None:
        torch.mm(self.p_rows, self.w2, out=self.g_rows)  # g itself is no longer needed
        _, backward = ACTIVATIONS[self.problem.options.activation]
        backward(self.g_rows, self.z_rows, grad_input=self.z_rows)
        if self.grads.b1 is not None:
            self._add_rows(self.grads.b1[0], self.z_rows, start == 0)

    def input_grads(self, start: int, stop: int) -> None:
        if self.grads.w1 is not None:
            add_product(self.grads.w1, self.z_rows, self.x, start == 0, copies=True)
        if self.grads.hidden is not None:
            torch.mm(self.z_rows, self.w1, out=self.grads.hidden[start:stop])

    @staticmethod
    def divisor(problem: Problem, selection: Selection) -> Tensor:
        options, weight = problem.options, _weight(problem, selection)
        full = partial(problem.hidden.new_full, (), dtype=problem.loss_dtype)
        if options.reduction != "mean" or not selection.capacity:
            return full(1.0)
        if problem.normalizer is not None:
            divisor = problem.normalizer
        elif options.divisor is not None:
            divisor = full(options.divisor)
        else:
            divisor = full(selection.capacity) if weight is None else weight.sum()
        return torch.where(divisor == 0, torch.nan, divisor)

    @staticmethod
    def reduce(selection: Selection, losses: Tensor, divisor: Tensor) -> Tensor:
        return losses.sum() / divisor

    @staticmethod
    def scatter(
        dh: Tensor,
        place: Tensor | None,
        total: int,
        dtype: torch.dtype,
        upstream: Tensor | None,
        in_place: bool,
    ) -> Tensor:
        if place is None:
            return _scaled(dh, upstream, dtype, in_place)
        out = dh.new_zeros(total, dh.shape[1], dtype=dtype)
        for start in range(0, dh.shape[0], 4096):  # a block at a time: no second (N, d) in between
            rows = slice(start, start + 4096)
            out.index_copy_(0, place[rows], _scaled(dh[rows], upstream, dtype))
        return out

    @staticmethod
    def scale(
        grads: Gradients, dtypes: tuple[torch.dtype, ...], upstream: Tensor | None, in_place: bool
    ) -> tuple[Tensor | None, ...]:
        b1, b2 = (None if sums is None else sums[0] for sums in (grads.b1, grads.b2))
        w1, w2 = (
            None if x is None else _scaled(x, upstream, dtype, in_place)
            for x, dtype in ((grads.w1, dtypes[0]), (grads.w2, dtypes[2]))
        )
        return (
            w1,
            None if b1 is None else _scaled(b1, upstream, dtypes[1]),
            w2,
            None if b2 is None else _scaled(b2, upstream, dtypes[3]),
        )


def _weight(problem: Problem, selection: Selection) -> Tensor | None:
    """(capacity,) row weights in selection order."""
    if problem.weight is None or problem.options.weight_compact or selection.index is None:
        return problem.weight
    return problem.weight[selection.index]


def _coefficient(problem: Problem, selection: Selection, upstream: Tensor | None, divisor: Tensor) -> Tensor:
    """(capacity,) factors of the rows' derivatives: weight · upstream / divisor."""
    weight, scale = _weight(problem, selection), (1.0 if upstream is None else upstream) / divisor
    return (scale if weight is None else scale * weight).expand(selection.capacity)


def _scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    if scale is None:
        return grad.to(dtype)
    if not in_place or grad.dtype != dtype:
        return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
    return grad if scale.device.type == "cpu" and scale == 1 else grad.mul_(scale)
