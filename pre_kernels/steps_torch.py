"""The steps in plain PyTorch: the default on the CPU, and for float64 everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .checks import Problem
from .function import Selection, Wanted

aten = torch.ops.aten

WORKSPACE = {"cpu": 32 << 20, "cuda": 256 << 20}  # bytes; on the CPU a chunk should stay in the cache
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
    # unit vectors first: they cancel exactly where p and a are parallel
    p.div_(p_norm)
    a = a / torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp_min(1e-8)
    cosine = torch.linalg.vecdot(p, a).unsqueeze(1)
    if grad:
        # d(-cos)/dp = (cos · p/|p| - a/|a|) / |p|
        p.mul_(torch.where(norm > 0, cosine * (p_norm / norm), 0)).sub_(a).mul_(coefficient / p_norm)
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
    def __init__(self, problem: Problem, selection: Selection, wanted: Wanted) -> None:
        self.problem, self.wanted, self.index = problem, wanted, selection.index
        self.w1, self.b1, self.w2, self.b2 = problem.parameters()
        (m, d), z = problem.w1.shape, problem.w2.shape[0]
        budget = problem.workspace or WORKSPACE.get(problem.hidden.device.type, WORKSPACE["cuda"])
        rows = budget // ((d + 2 * m + z) * problem.dtype.itemsize)
        self.chunk = max(1, min(selection.capacity, max(MIN_ROWS, rows - rows % MIN_ROWS)))

        def buffer(rows: int, columns: int, dtype: torch.dtype = problem.dtype) -> Tensor:
            return problem.hidden.new_empty(rows, columns, dtype=dtype)

        wide = problem.loss_dtype
        self.z, self.g, self.p = (buffer(self.chunk, columns) for columns in (m, m, z))
        self.h = None if self.index is None and problem.hidden.dtype == problem.dtype else buffer(self.chunk, d)
        on_cpu = problem.hidden.device.type == "cpu"
        self.block = min(ROWS_IN_CACHE, self.chunk) if on_cpu else self.chunk  # rows of one pass of the row loss
        self.wide_p = None if wide == problem.dtype else buffer(self.block, z, wide)
        # the CPU's products of half precision come back in half precision, so a sum of them needs a place to land
        half = wide != problem.dtype and on_cpu
        self.partial = buffer(1, max(m * d if wanted.w1 else 0, m * z if wanted.w2 else 0)) if half else None

    @staticmethod
    def select(problem: Problem) -> Selection:
        rows = problem.rows
        if rows is None:
            return Selection(None, None, None, problem.hidden.shape[0])
        # a copy: the caller may reuse the tensor before the backward
        index = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows.to(torch.long, copy=True)
        return Selection(index, None, None, index.shape[0])

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)

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
        if self.problem.anchor_compact or self.index is None:
            rows = anchor[start:stop]
        else:
            rows = anchor.index_select(0, self.index[start:stop])
        return rows.to(self.problem.loss_dtype)

    def project(self, start: int, stop: int) -> None:
        n = stop - start
        self.x = self._rows(start, stop)
        self.z_rows, self.g_rows, self.p_rows = self.z[:n], self.g[:n], self.p[:n]
        self._linear(self.x, self.w1, self.b1, self.z_rows)
        forward, _ = ACTIVATIONS[self.problem.activation]
        forward(self.z_rows, out=self.g_rows)

    def row_loss(self, start: int, stop: int, coefficient: Tensor | None, losses: Tensor) -> None:
        self._linear(self.g_rows, self.w2, self.b2, self.p_rows)
        row_loss, grad = ROW_LOSSES[self.problem.loss], any(self.wanted)
        for first in range(start, stop, self.block):
            last = min(first + self.block, stop)
            p = self.p_rows[first - start : last - start]
            wide = p if self.wide_p is None else self.wide_p[: last - first].copy_(p)
            factor = 1.0 if coefficient is None else coefficient[first:last, None]
            torch.mul(row_loss(wide, self._anchor(first, last), grad, factor), factor, out=losses[first:last, None])
            if grad and wide is not p:
                p.copy_(wide)

    def _add_product(self, total: Tensor, y: Tensor, x: Tensor) -> None:
        """total += yᵀ·x"""
        if total.dtype == y.dtype:
            total.addmm_(y.t(), x)
        elif self.partial is None:
            total.add_(torch.mm(y.t(), x, out_dtype=total.dtype))
        else:
            total.add_(torch.mm(y.t(), x, out=self.partial[0, : total.numel()].view_as(total)))

    def _add_rows(self, total: Tensor, y: Tensor) -> None:
        """total += Σ y; the CPU sums half precision in float32 through a copy, which should stay in the cache."""
        for rows in y.split(ROWS_IN_CACHE) if y.device.type == "cpu" else [y]:
            total.add_(rows.sum(0, dtype=total.dtype))

    def output_grads(self, dw2: Tensor | None, db2: Tensor | None) -> None:
        if dw2 is not None:
            self._add_product(dw2, self.p_rows, self.g_rows)
        if db2 is not None:
            self._add_rows(db2, self.p_rows)

    def backproject(self) -> None:
        torch.mm(self.p_rows, self.w2, out=self.g_rows)  # g itself is no longer needed
        _, backward = ACTIVATIONS[self.problem.activation]
        backward(self.g_rows, self.z_rows, grad_input=self.z_rows)

    def input_grads(self, start: int, stop: int, dh: Tensor | None, dw1: Tensor | None, db1: Tensor | None) -> None:
        if dw1 is not None:
            self._add_product(dw1, self.z_rows, self.x)
        if db1 is not None:
            self._add_rows(db1, self.z_rows)
        if dh is not None:
            torch.mm(self.z_rows, self.w1, out=dh[start:stop])

    @staticmethod
    def scatter(dh: Tensor, selection: Selection, total: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        if selection.index is None:
            return TorchSteps.scaled(dh, scale, dtype)
        out = dh.new_zeros(total, dh.shape[1], dtype=dtype)
        for start in range(0, selection.capacity, 4096):  # a block at a time: no second (N, d) in between
            rows = slice(start, start + 4096)
            out.index_copy_(0, selection.index[rows], TorchSteps.scaled(dh[rows], scale, dtype))
        return out

    @staticmethod
    def scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        if scale is None:
            return grad.to(dtype)
        return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
