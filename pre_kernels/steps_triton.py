"""The steps in Triton: rows are gathered inside the products, and N stays on the device where it can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import Problem
from .function import Gradients, Layout, Selection
from .kernels.activation import apply_activation_grad
from .kernels.finish import reduce_loss, scale_gradients
from .kernels.launch import RowShape
from .kernels.matmul import matmul
from .kernels.quantize import Quantized
from .kernels.row_loss import row_loss
from .kernels.rows import invert, scatter, select
from .kernels.weight_grad import add_weight_grad

WORKSPACE = 256 << 20  # bytes
CHUNK_MULTIPLE = 128  # rows: full tiles, and index offsets that stay 16-byte aligned


class RowSteps:
    """What the two implementations with Triton's row kernels share: everything but the products."""

    clear = False  # whether products read rows beyond a count that is on the device
    workspace = WORKSPACE

    @staticmethod
    def columns(problem: Problem) -> int:
        """Of all buffers of a chunk together."""
        _, m, z = problem.widths
        return 2 * m + z

    @classmethod
    def layout(cls, problem: Problem) -> Layout:
        _, m, z = problem.widths
        rows = (problem.options.workspace or cls.workspace) // (cls.columns(problem) * problem.options.dtype.itemsize)
        rows = max(CHUNK_MULTIPLE, rows - rows % CHUNK_MULTIPLE)
        chunk = min(rows, max(1, problem.bound))
        return Layout(rows, (RowShape.of(m).programs(chunk), RowShape.of(z).programs(chunk)), CHUNK_MULTIPLE)

    @staticmethod
    def select(problem: Problem) -> Selection:
        rows, total = problem.rows, problem.hidden.shape[0]
        if rows is None:
            return Selection(None, None, None, total)
        if not problem.masked:
            rows = rows.contiguous()
            return Selection(rows, invert(rows, total), None, rows.shape[0])
        if total == 0:
            nothing = rows.new_empty(0, dtype=torch.int32)
            return Selection(nothing, nothing, None, 0)
        if not problem.count_on_host:
            index, place, count = select(rows.contiguous(), problem.bound)
            return Selection(index, place, count, problem.bound)
        index, place, count = select(rows.contiguous(), total)
        capacity = int(count)
        return Selection(index[:capacity], place, None, capacity)

    def __init__(
        self,
        problem: Problem,
        selection: Selection,
        chunk: int,
        losses: Tensor | None,
        grads: Gradients,
        upstream: Tensor | None,
        divisor: Tensor | None,
    ) -> None:
        self.problem, self.options, self.losses, self.grads = problem, problem.options, losses, grads
        self.index, self.count = selection.index, selection.count
        self.needs_dp = any(grad is not None for grad in grads)
        self.w1, self.b1, self.w2, self.b2 = problem.parameters()
        self.factors: dict[str, Any] = {"upstream": upstream, "divisor": divisor}
        _, m, z = problem.widths
        self.z, self.g, self.p = (self._buffer(chunk, columns) for columns in (m, m, z))

    def _buffer(self, rows: int, columns: int) -> Tensor:
        return self.problem.hidden.new_empty(rows, columns, dtype=self.options.dtype)

    def _begin(self, start: int, stop: int) -> None:
        n = stop - start
        self.z_rows, self.g_rows, self.p_rows = self.z[:n], self.g[:n], self.p[:n]
        self.live: dict[str, Any] = {"count": self.count, "start": start}

    def _row_loss(self, start: int, quantized: Quantized | None = None) -> None:
        indexed = self.index is not None
        row_loss(
            self.p_rows,
            self.problem.anchor,
            self.losses,
            loss=self.options.loss,
            grad=self.needs_dp,
            index=self.index,
            gather_anchor=indexed and not self.options.anchor_compact,
            weight=self.problem.weight,
            gather_weight=indexed and not self.options.weight_compact,
            sums=self.grads.b2,
            first=start == 0,
            clear=self.clear,
            quantized=quantized if self.needs_dp else None,
            **self.factors,
            **self.live,
        )

    @staticmethod
    def reduce(problem: Problem, selection: Selection, losses: Tensor) -> tuple[Tensor, Tensor]:
        return reduce_loss(
            losses,
            mean=problem.options.reduction == "mean",
            number=problem.options.divisor,
            normalizer=problem.normalizer,
            weight=problem.weight,
            index=None if problem.options.weight_compact else selection.index,
            count=selection.count,
        )

    @staticmethod
    def scatter(
        dh: Tensor,
        place: Tensor | None,
        total: int,
        dtype: torch.dtype,
        upstream: Tensor | None,
        divisor: Tensor | None,
    ) -> Tensor:
        if place is None and upstream is None and dh.dtype == dtype:
            return dh
        out = dh.new_empty(total, dh.shape[1], dtype=dtype)
        scatter(dh, out, inverse=place, upstream=upstream, divisor=divisor)
        return out

    @staticmethod
    def scale(
        grads: Gradients, dtypes: tuple[torch.dtype, ...], upstream: Tensor | None, divisor: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        order = (dtypes[0], dtypes[2], dtypes[1], dtypes[3])
        w1, w2, b1, b2 = scale_gradients((grads.w1, grads.w2), (grads.b1, grads.b2), order, upstream, divisor)
        return w1, b1, w2, b2


class TritonSteps(RowSteps):
    def _hidden(self, start: int, stop: int) -> Tensor:
        """Hidden rows for a kernel that gathers by index, or the chunk's own."""
        return self.problem.hidden if self.index is not None else self.problem.hidden[start:stop]

    def project(self, start: int, stop: int) -> None:
        self._begin(start, stop)
        matmul(
            self._hidden(start, stop),
            self.w1.t(),
            self.z_rows,
            bias=self.b1,
            index=self.index,
            aux=self.g_rows,
            epilogue="activate",
            activation=self.options.activation,
            **self.live,
        )

    def row_loss(self, start: int, stop: int) -> None:
        matmul(self.g_rows, self.w2.t(), self.p_rows, bias=self.b2, **self.live)
        self._row_loss(start)

    def output_grads(self, start: int, stop: int) -> None:
        assert self.grads.w2 is not None
        add_weight_grad(self.grads.w2, self.p_rows, self.g_rows, first=start == 0, **self.live)

    def backproject(self, start: int, stop: int) -> None:
        matmul(
            self.p_rows,
            self.w2,
            self.z_rows,
            aux=self.z_rows,
            epilogue="activate_grad",
            activation=self.options.activation,
            **self.live,
        )
        if self.grads.b1 is not None:
            apply_activation_grad(
                None, self.z_rows, self.options.activation, sums=self.grads.b1, first=start == 0, **self.live
            )

    def input_grads(self, start: int, stop: int) -> None:
        if self.grads.w1 is not None:
            hidden, first = self._hidden(start, stop), start == 0
            add_weight_grad(self.grads.w1, self.z_rows, hidden, index=self.index, first=first, **self.live)
        if self.grads.hidden is not None:
            matmul(self.z_rows, self.w1, self.grads.hidden[start:stop], **self.live)
