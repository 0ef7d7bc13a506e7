"""The steps with the vendor's matmuls and Triton passes over the rows between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..problem import Problem
from .kernels.quantize import Quantized, quantize_weight
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
        float8_weights = 2 * sum([w.numel() for w, _ in problem.layers])
        return TritonSteps.fixed_bytes(problem) + (
            float8_weights if problem.options.precision else 0
        )

    def _weights(self) -> tuple[list[Any], list[Any]]:
        self.float8 = None
        if self.options.precision is None:
            return super()._weights()
        self.float8 = Quantized.empty(self.p, self.p.shape[0], max(self.problem.widths))
        quantized = [
            quantize_weight(w, self.grads.before(layer)) for layer, (w, _) in enumerate(self.layers)
        ]
        return [rows for rows, _ in quantized], [columns for _, columns in quantized]

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
