"""The steps with the vendor's matmuls and Triton passes over the rows between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..problem import Problem
from .kernels.quantize import Quantized, quantize_weights
from .products import add_product, linear, scaled_linear
from .steps_triton import TritonSteps


class BlasSteps(TritonSteps):
    """Steps whose matmuls take their number of rows from the host.

    Where only the device knows N, all rows of the capacity take part, with zeros beyond N: the
    result is right, and costs as much as the whole capacity.
    """

    zero_padding = True

    @staticmethod
    def columns(problem: Problem) -> int:
        # A float8 row takes half the bytes of a bfloat16 row.
        float8 = max(problem.widths) // 2 if problem.options.precision else 0
        return TritonSteps.columns(problem) + float8

    @staticmethod
    def fixed_bytes(problem: Problem) -> int:
        d, m, z = problem.widths
        float8_weights = 2 * m * (d + z) if problem.options.precision else 0
        return TritonSteps.fixed_bytes(problem) + float8_weights

    def _prepare(self) -> None:
        super()._prepare()
        self.float8 = None
        if self.options.precision == "fp8":
            self.float8 = Quantized.empty(self.z, self.z.shape[0], max(self.problem.widths))
            back = any(
                grad is not None for grad in (self.grads.hidden, self.grads.w1, self.grads.b1)
            )
            self.project_1, self.project_2, self.back_1, self.back_2 = quantize_weights(
                self.w1, self.w2, columns=(self.grads.hidden is not None, back)
            )

    def _quantized(self, rows: Tensor) -> Quantized | None:
        # One buffer serves all passes, because the matmul after a pass uses its rows once.
        return None if self.float8 is None else self.float8.rows(*rows.shape)

    def _linear(self, x: Tensor, weight: Any, bias: Tensor | None, out: Tensor) -> None:
        quantized = self._quantized(x)
        if quantized is None:
            linear(x, weight, bias, out)
        else:
            scaled_linear(quantized, weight, bias, out)

    def _add_product(self, total: Tensor, dy: Tensor, x: Tensor, first: bool) -> None:
        if not add_product(total, dy, x, first):
            super()._add_product(total, dy, x, first)
