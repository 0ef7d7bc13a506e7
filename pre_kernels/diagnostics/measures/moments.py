"""Centred sums over the rows of two feature matrices, updated as rows come. Spectrum and CKA are
computed from them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from . import inputs

# A feature with a smaller ratio of standard deviation to mean is constant up to float64 rounding.
CONSTANT = 1e-12


class Moments:
    """Sums over aligned rows x (width d) and y (width z), centred on the means of all rows seen so
    far, in float64.

        product = Σ x yᵀ                         (d, z)
        square_x = Σ |x|²,  square_y = Σ |y|²
        cubic_x = Σ |y|² x,  cubic_y = Σ |x|² y  (d,), (z,)
        quartic = Σ |x|² |y|²

    product / rows is the covariance. The debiased HSIC also needs the others. Memory: 8·d·z bytes,
    whatever the number of rows. Each update moves the centre, and the exact formulas move the sums
    with it (that for the product is from Chan, Golub and LeVeque 1983). No large mean is ever
    subtracted from a large sum, so a constant offset in a feature costs no accuracy. The sums are
    on the device of the first rows.
    """

    product: Tensor
    mean_x: Tensor
    mean_y: Tensor
    square_x: Tensor
    square_y: Tensor
    quartic: Tensor
    cubic_x: Tensor
    cubic_y: Tensor

    def __init__(self) -> None:
        self.rows = 0

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add rows x (N, d) and y (N, z), N > 0. y = None stands for y = x. If it raises TypeError
        or ValueError, nothing has changed."""
        inputs.check_rows("x", x)
        if y is not None:
            inputs.check_rows("y", y)
            inputs.check_aligned("y", y, "x", x)
        if self.rows:
            self._check_widths(x.shape[1], (x if y is None else y).shape[1])
        self.add(x, y)

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add rows that are checked."""
        device = self.product.device if self.rows else x.device
        x = x.detach().to(device, torch.float64)
        y = x if y is None else y.detach().to(device, torch.float64)
        if not self.rows:
            self.mean_x, self.mean_y = torch.zeros_like(x[0]), torch.zeros_like(y[0])
            self.cubic_x, self.cubic_y = torch.zeros_like(x[0]), torch.zeros_like(y[0])
            self.square_x, self.square_y, self.quartic = (x.new_zeros(()) for _ in range(3))
            self.product = x.new_zeros(x.shape[1], y.shape[1])
        same = y is x
        self._move_to(x.mean(0), y.mean(0), len(x))
        x = x - self.mean_x
        y = x if same else y - self.mean_y
        p, q = x.square().sum(1), y.square().sum(1)
        self.product.addmm_(x.T, y)
        self.square_x += p.sum()
        self.square_y += q.sum()
        self.quartic += p @ q
        self.cubic_x += q @ x
        self.cubic_y += p @ y

    def merge(self, other: Moments) -> None:
        """Add the rows that another `Moments` has seen, for example in another process. `other` is
        not changed."""
        if not other.rows:
            return
        if not self.rows:
            self.__dict__.update(copy.deepcopy(other.__dict__))
            return
        self._check_widths(*other.product.shape)
        other = copy.deepcopy(other)
        for name, value in vars(other).items():
            if torch.is_tensor(value):
                setattr(other, name, value.to(self.product.device))
        mean_x, mean_y = other.mean_x, other.mean_y
        rows = self.rows
        other._move_to(self.mean_x, self.mean_y, rows)
        self._move_to(mean_x, mean_y, other.rows - rows)
        for name in ("product", "square_x", "square_y", "quartic", "cubic_x", "cubic_y"):
            getattr(self, name).add_(getattr(other, name))

    def varies(self) -> tuple[Tensor, Tensor]:
        """Whether x and y vary beyond rounding, as two 0-d bool tensors."""
        noise = CONSTANT**2 * self.rows
        return (
            self.square_x > noise * self.mean_x.square().sum(),
            self.square_y > noise * self.mean_y.square().sum(),
        )

    def hsic(self, debiased: bool = False) -> float:
        """The Hilbert-Schmidt independence criterion of the linear kernels x xᵀ and y yᵀ, up to a
        constant factor.

        It is |product|²_F. The unbiased one (Song et al. 2012) is, for centred rows, whose kernels
        sum to 0 along each row:

            |product|²_F - quartic·n / (n - 2) + square_x·square_y / ((n - 1)(n - 2))

        The unbiased one is nan with fewer than 4 rows.
        """
        biased = self.product.square().sum()
        n = self.rows
        if not debiased:
            return biased.item()
        if n < 4:
            return float("nan")
        unbiased = (
            biased
            - self.quartic * (n / (n - 2))
            + self.square_x * self.square_y / ((n - 1) * (n - 2))
        )
        return unbiased.item()

    def _check_widths(self, d: int, z: int) -> None:
        if self.product.shape != (d, z):
            raise ValueError(
                f"x, y: got widths {d} and {z}, want those of the rows before, "
                f"{tuple(self.product.shape)}"
            )

    def _move_to(self, mean_x: Tensor, mean_y: Tensor, rows: int) -> None:
        """Centre the sums on the mean that includes `rows` further rows with these means, and add
        `rows` to the count."""
        n = self.rows
        self.rows += rows
        towards_x = (mean_x - self.mean_x) * (rows / self.rows)
        towards_y = (mean_y - self.mean_y) * (rows / self.rows)
        self.mean_x = self.mean_x + towards_x
        self.mean_y = self.mean_y + towards_y
        if not n:
            return
        # Relative to the new centre, x becomes x + u and y becomes y + v, while Σ x = Σ y = 0.
        u, v = -towards_x, -towards_y
        uu, vv = u @ u, v @ v
        across_x, across_y = self.product @ v, u @ self.product
        self.quartic += 2 * (v @ self.cubic_y + u @ self.cubic_x) + 4 * (u @ across_x)
        self.quartic += vv * self.square_x + uu * self.square_y + n * uu * vv
        self.cubic_x += 2 * across_x + u * self.square_y + n * vv * u
        self.cubic_y += 2 * across_y + v * self.square_x + n * uu * v
        self.square_x += n * uu
        self.square_y += n * vv
        self.product.addr_(u, v, alpha=n)
