"""The steps in Triton: rows are gathered inside the products, and N stays on the device where it can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import Problem
from .function import Selection, Wanted
from .kernels.matmul import matmul
from .kernels.row_loss import row_loss
from .kernels.rows import invert, scatter, select
from .kernels.weight_grad import add_column_sum, add_weight_grad

WORKSPACE = 256 << 20  # bytes
CHUNK_MULTIPLE = 256  # rows: full tiles, and index offsets that stay 16-byte aligned


class TritonSteps:
    def __init__(self, problem: Problem, selection: Selection, wanted: Wanted) -> None:
        self.problem, self.wanted = problem, wanted
        self.index, self.count = selection.index, selection.count
        self.w1, self.b1, self.w2, self.b2 = problem.parameters()
        (m, _), z = problem.w1.shape, problem.w2.shape[0]
        rows = (problem.workspace or WORKSPACE) // ((2 * m + z) * problem.dtype.itemsize)
        rows = max(CHUNK_MULTIPLE, rows - rows % CHUNK_MULTIPLE)
        self.chunk = max(1, min(rows, selection.capacity))
        self.z, self.g, self.p = (
            problem.hidden.new_empty(self.chunk, columns, dtype=problem.dtype) for columns in (m, m, z)
        )

    @staticmethod
    def select(problem: Problem) -> Selection:
        rows, total = problem.rows, problem.hidden.shape[0]
        if rows is None:
            return Selection(None, None, None, total)
        if rows.dtype != torch.bool:
            # a copy: the caller may reuse the tensor before the backward
            return Selection(rows.clone(memory_format=torch.contiguous_format), None, None, rows.shape[0])
        index, inverse, count = select(rows.contiguous())
        if not problem.count_on_host:
            return Selection(index, inverse, count, total)
        capacity = int(count)
        return Selection(index[:capacity], inverse, None, capacity)

    def _hidden(self, start: int, stop: int) -> Tensor:
        """Hidden rows for a kernel that gathers by index, or the chunk's own."""
        return self.problem.hidden if self.index is not None else self.problem.hidden[start:stop]

    def project(self, start: int, stop: int) -> None:
        n = stop - start
        self.z_rows, self.g_rows, self.p_rows = self.z[:n], self.g[:n], self.p[:n]
        self.live: dict[str, Any] = {"count": self.count, "start": start}
        matmul(
            self._hidden(start, stop),
            self.w1.t(),
            self.z_rows,
            bias=self.b1,
            index=self.index,
            aux=self.g_rows,
            epilogue="activate",
            activation=self.problem.activation,
            **self.live,
        )

    def row_loss(self, start: int, stop: int, coefficient: Tensor | None, losses: Tensor) -> None:
        matmul(self.g_rows, self.w2.t(), self.p_rows, bias=self.b2, **self.live)
        row_loss(
            self.p_rows,
            self.problem.anchor,
            losses,
            loss=self.problem.loss,
            grad=any(self.wanted),
            coefficient=coefficient,
            index=None if self.problem.anchor_compact else self.index,
            **self.live,
        )

    def output_grads(self, dw2: Tensor | None, db2: Tensor | None) -> None:
        if dw2 is not None:
            add_weight_grad(dw2, self.p_rows, self.g_rows, **self.live)
        if db2 is not None:
            add_column_sum(db2, self.p_rows, **self.live)

    def backproject(self) -> None:
        matmul(
            self.p_rows,
            self.w2,
            self.z_rows,
            aux=self.z_rows,
            epilogue="activate_grad",
            activation=self.problem.activation,
            **self.live,
        )

    def input_grads(self, start: int, stop: int, dh: Tensor | None, dw1: Tensor | None, db1: Tensor | None) -> None:
        if dw1 is not None:
            add_weight_grad(dw1, self.z_rows, self._hidden(start, stop), index=self.index, **self.live)
        if db1 is not None:
            add_column_sum(db1, self.z_rows, **self.live)
        if dh is not None:
            matmul(self.z_rows, self.w1, dh[start:stop], **self.live)

    @staticmethod
    def scatter(dh: Tensor, selection: Selection, total: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        inverse = selection.inverse
        if inverse is None and selection.index is not None:
            inverse = invert(selection.index, total)
        out = dh.new_empty(total, dh.shape[1], dtype=dtype)
        scatter(dh, out, inverse=inverse, scale=scale)
        return out

    @staticmethod
    def scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        out = torch.empty_like(grad, dtype=dtype)
        columns = grad.shape[-1]
        scatter(grad.view(-1, columns), out.view(-1, columns), scale=scale)
        return out
