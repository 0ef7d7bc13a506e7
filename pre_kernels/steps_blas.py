"""The vendor's products over chunks of rows, with Triton's row kernels between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .checks import Problem
from .function import Selection
from .kernels.activation import apply_activation, apply_activation_grad
from .kernels.quantize import Quantized
from .kernels.rows import gather
from .kernels.weight_grad import add_weight_grad
from .products import add_product, linear, scaled_linear
from .steps_triton import RowSteps

WORKSPACE = 512 << 20  # bytes


class BlasSteps(RowSteps):
    """A product takes its number of rows from the host. Where only the device knows N, all rows of the capacity take
    part, zero beyond N: right, but as slow as the capacity is large."""

    clear = True
    workspace = WORKSPACE

    @staticmethod
    def columns(problem: Problem) -> int:
        d, m, z = problem.widths
        # float8 rows take half of a bfloat16 row
        return 2 * m + z + (d if _copies(problem) else 0) + (max(d, m, z) // 2 if problem.options.precision else 0)

    def __init__(self, problem: Problem, selection: Selection, chunk: int, *rest: Any) -> None:
        super().__init__(problem, selection, chunk, *rest)
        self.h = self._buffer(chunk, problem.widths[0]) if _copies(problem) else None
        self.quantized = None
        if problem.options.precision == "fp8":
            self.quantized = Quantized.empty(problem.hidden, chunk, max(problem.widths))
        back = self.grads.hidden, self.grads.w1, self.grads.b1
        self.project_1, self.project_2 = self._weight(self.w1), self._weight(self.w2)
        self.back_2 = self._weight(self.w2.t()) if any(grad is not None for grad in back) else None
        self.back_1 = self._weight(self.w1.t()) if self.grads.hidden is not None else None

    def _weight(self, weight: Tensor) -> Tensor | Quantized:
        """(N, K), quantized along K if the products are."""
        if self.quantized is None:
            return weight
        weight = weight.contiguous()  # K has to lie next to each other in memory
        quantized = Quantized.empty(weight, *weight.shape)
        gather(weight, None, quantized=quantized)
        return quantized

    def _rows(self, n: int, width: int) -> Quantized | None:
        """Where the pass before a product leaves its float8 rows: one buffer, since each is used once."""
        return None if self.quantized is None else self.quantized.rows(n, width)

    def _linear(self, x: Tensor, weight: Any, bias: Tensor | None, out: Tensor) -> None:
        """out = x · weightᵀ + bias; of the rows that `_rows` holds if the products are quantized."""
        quantized = self._rows(*x.shape)
        if quantized is None:
            linear(x, weight, bias, out)
        else:
            scaled_linear(quantized, weight, bias, out)

    def project(self, start: int, stop: int) -> None:
        self._begin(start, stop)
        n, width = stop - start, self.problem.widths[0]
        self.x = self.problem.hidden[start:stop] if self.h is None else self.h[:n]
        quantized = self._rows(n, width)
        if self.h is not None or quantized is not None:
            gather(
                self.problem.hidden,
                None if self.h is None else self.x,
                index=self.index,
                quantized=quantized,
                **self.live,
            )
        self._linear(self.x, self.project_1, self.b1, self.z_rows)
        apply_activation(self.z_rows, self.g_rows, self.options.activation, self._rows(*self.g_rows.shape))

    def row_loss(self, start: int, stop: int) -> None:
        self._linear(self.g_rows, self.project_2, self.b2, self.p_rows)
        self._row_loss(start, self._rows(*self.p_rows.shape))

    def _add_product(self, total: Tensor, dy: Tensor, x: Tensor, first: bool) -> None:
        if not add_product(total, dy, x, first):
            add_weight_grad(total, dy, x, first=first)

    def output_grads(self, start: int, stop: int) -> None:
        assert self.grads.w2 is not None
        self._add_product(self.grads.w2, self.p_rows, self.g_rows, start == 0)

    def backproject(self, start: int, stop: int) -> None:
        self._linear(self.p_rows, self.back_2, None, self.g_rows)  # g itself is no longer needed
        # rows beyond the count are zero in dP, so in dG, and stay so
        apply_activation_grad(
            self.g_rows,
            self.z_rows,
            self.options.activation,
            sums=self.grads.b1,
            first=start == 0,
            quantized=self._rows(*self.z_rows.shape),
        )

    def input_grads(self, start: int, stop: int) -> None:
        if self.grads.w1 is not None:
            self._add_product(self.grads.w1, self.z_rows, self.x, start == 0)
        if self.grads.hidden is not None:
            self._linear(self.z_rows, self.back_1, None, self.grads.hidden[start:stop])


def _copies(problem: Problem) -> bool:
    """Whether the chunk's rows of hidden have to be gathered or cast."""
    return problem.rows is not None or problem.hidden.dtype != problem.options.dtype
