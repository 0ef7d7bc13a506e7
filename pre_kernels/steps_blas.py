"""The vendor's products over chunks of rows, with Triton's row kernels between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import Problem
from .kernels.activation import apply_activation, apply_activation_grad
from .kernels.rows import gather
from .kernels.weight_grad import add_weight_grad
from .products import add_product, linear
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
        return 2 * m + z + (d if _copies(problem) else 0)

    def __init__(self, problem: Problem, selection: Any, chunk: int, *rest: Any) -> None:
        super().__init__(problem, selection, chunk, *rest)
        self.h = self._buffer(chunk, problem.widths[0]) if _copies(problem) else None

    def project(self, start: int, stop: int) -> None:
        self._begin(start, stop)
        if self.h is None:
            self.x = self.problem.hidden[start:stop]
        else:
            self.x = self.h[: stop - start]
            gather(self.problem.hidden, self.x, index=self.index, **self.live)
        linear(self.x, self.w1, self.b1, self.z_rows)
        apply_activation(self.z_rows, self.g_rows, self.options.activation)

    def row_loss(self, start: int, stop: int) -> None:
        linear(self.g_rows, self.w2, self.b2, self.p_rows)
        self._row_loss(start)

    def _add_product(self, total: Tensor, dy: Tensor, x: Tensor, first: bool) -> None:
        if not add_product(total, dy, x, first):
            add_weight_grad(total, dy, x, first=first)

    def output_grads(self, start: int, stop: int) -> None:
        assert self.grads.w2 is not None
        self._add_product(self.grads.w2, self.p_rows, self.g_rows, start == 0)

    def backproject(self, start: int, stop: int) -> None:
        torch.mm(self.p_rows, self.w2, out=self.g_rows)  # g itself is no longer needed
        # rows beyond the count are zero in dP, so in dG, and stay so
        apply_activation_grad(self.g_rows, self.z_rows, self.options.activation, sums=self.grads.b1, first=start == 0)

    def input_grads(self, start: int, stop: int) -> None:
        if self.grads.w1 is not None:
            self._add_product(self.grads.w1, self.z_rows, self.x, start == 0)
        if self.grads.hidden is not None:
            torch.mm(self.z_rows, self.w1, out=self.grads.hidden[start:stop])


def _copies(problem: Problem) -> bool:
    """Whether the chunk's rows of hidden have to be gathered or cast."""
    return problem.rows is not None or problem.hidden.dtype != problem.options.dtype
