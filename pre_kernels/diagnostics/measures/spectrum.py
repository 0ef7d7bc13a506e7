"""How many directions the features use, how correlated the features are, and how large the rows
get, over a stream of rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import inputs
from .moments import CONSTANT, Moments


class SpectrumSummary(NamedTuple):
    """The result of `Spectrum`. A value is nan if there was nothing to measure."""

    effective_dimension: float
    """In 1..width."""
    components_90: float
    """A whole number in 1..width."""
    correlation: float
    """In 0..1."""
    norm_mean: float
    """The mean norm, in the unit of the features, as are the next two."""
    norm_median: float
    """The median norm, from a histogram. Of an even number of rows, the lower of the middle two."""
    norm_max: float
    """The largest norm."""
    massive_activations: float
    """The share of numbers that are massive, in 0..1."""
    massive_tokens: float
    """The share of rows with a massive number, in 0..1."""


class Spectrum:
    """PCA effective dimension, mean feature correlation (arXiv 2603.20808), norms and massive
    activations of rows.

    C is the covariance of all rows seen, λ its eigenvalues, and i ≠ j two features that vary:

        effective_dimension = (Σ λ)² / Σ λ² = (tr C)² / |C|²_F      the participation ratio
        components_90       = the smallest k such that the k largest λ sum to 90 % of Σ λ
        correlation         = mean over i ≠ j of |C_ij| / √(C_ii C_jj)
        norm_*              = mean, median, largest of |row|₂; the median within 0.6 %, from a
                              histogram of its logarithm
        massive_activations = share of numbers a of a row h with |a| > `above` and
                              |a| ≥ `times` · median |h|
        massive_tokens      = share of rows that have such a number

    The last two follow Sun et al. 2024 (Massive Activations in Large Language Models: magnitude
    above 100 and about 1,000 times the median of the hidden state). Here the median is that of the
    row itself, so the share does not depend on which rows came together. The covariance of n rows
    has at most n - 1 directions, so compare dimensions only between equal numbers of rows.

    | unchanged by        | effective_dimension, components_90 | correlation | norms | massive |
    |---------------------|------------------------------------|-------------|-------|---------|
    | order of rows       | yes                                | yes         | yes   | yes     |
    | rotation            | yes                                | no          | yes   | no      |
    | moving the origin   | yes                                | yes         | no    | no      |
    | one scale for all   | yes                                | yes         | scale with it | no |
    | a scale per feature | no                                 | yes         | no    | no      |

    Memory: 8·width² bytes (128 MiB at 4,096) on the device of the first rows, whatever the number
    of rows. Time: a float64 matmul of 2·rows·width² operations, and one eigenvalue decomposition in
    `result`.

    Args:
        above: the magnitude that a massive number exceeds.
        times: how many medians of its row a massive number has at least.

    Raises:
        ValueError: one of them is not positive.
    """

    # The histogram of norms has BINS bins for each doubling, and covers OCTAVES doublings below and
    # above 1.
    BINS = 64
    OCTAVES = 128

    def __init__(self, *, above: float = 100.0, times: float = 1000.0) -> None:
        if not above > 0:
            raise ValueError(f"above: got {above}, want a positive magnitude")
        if not times > 0:
            raise ValueError(f"times: got {times}, want a positive factor")
        self.above = above
        self.times = times
        self.moments = Moments()
        self._norm_sum = 0.0
        self._norm_max = 0.0
        # How many numbers are massive, and how many rows have such a number.
        self._massive = 0
        self._with_massive = 0
        self._histogram = torch.zeros(2 * self.OCTAVES * self.BINS, dtype=torch.int64)

    def update(self, rows: Tensor) -> None:
        """Add rows (N, width), floating point and finite, N > 0. If it raises TypeError or
        ValueError, nothing has changed."""
        inputs.check_rows("rows", rows)
        if self.moments.rows and rows.shape[1] != len(self.moments.mean_x):
            raise ValueError(
                f"rows: got width {rows.shape[1]}, want that of the rows before, "
                f"{len(self.moments.mean_x)}"
            )
        self.add(rows)

    def add(self, rows: Tensor) -> None:
        """Add rows that are checked."""
        x = rows.detach().double()
        norms = torch.linalg.vector_norm(x, dim=1)
        self._norm_sum += norms.sum().item()
        self._norm_max = max(self._norm_max, norms.max().item())
        bins = (
            (norms.log2() * self.BINS)
            .floor()
            .clamp(-self.OCTAVES * self.BINS, self.OCTAVES * self.BINS - 1)
        )
        bins = bins.long() + self.OCTAVES * self.BINS
        self._histogram += torch.bincount(bins, minlength=len(self._histogram)).cpu()

        # Only rows with a large number, few if any, need their median.
        large = x.abs().amax(1) > self.above
        if large.any():
            size = x[large].abs()
            massive = (size > self.above) & (
                size >= self.times * size.median(dim=1, keepdim=True).values
            )
            self._massive += int(massive.sum())
            self._with_massive += int(massive.any(1).sum())
        self.moments.add(x)

    def merge(self, other: Spectrum) -> None:
        """Add the rows that another `Spectrum` has seen. It needs the same `above` and `times`, and
        is not changed."""
        if (self.above, self.times) != (other.above, other.times):
            raise ValueError(
                f"other: got above {other.above}, times {other.times}, want {self.above} and "
                f"{self.times} as here"
            )
        self.moments.merge(other.moments)
        self._norm_sum += other._norm_sum
        self._norm_max = max(self._norm_max, other._norm_max)
        self._histogram += other._histogram
        self._massive += other._massive
        self._with_massive += other._with_massive

    def result(self) -> SpectrumSummary:
        """The summary of all rows so far. ValueError if there are none."""
        count = self.moments.rows
        if not count:
            raise ValueError("rows: got none so far, want at least one before the result")
        dimension, components, correlation = self._of_covariance()
        return SpectrumSummary(
            dimension,
            components,
            correlation,
            self._norm_sum / count,
            self._median_norm(),
            self._norm_max,
            self._massive / (count * len(self.moments.mean_x)),
            self._with_massive / count,
        )

    def _of_covariance(self) -> tuple[float, float, float]:
        c, mean = self.moments.product, self.moments.mean_x
        if not self.moments.varies()[0]:
            return math.nan, math.nan, math.nan
        variance = c.diagonal()
        # With a trace of 1 no square overflows or underflows, whatever the unit of the features.
        relative = c / variance.sum()
        dimension = 1 / relative.square().sum().item()
        shares = torch.linalg.eigvalsh(relative).flip(0).cumsum(0)
        components = int((shares < 0.9 * (1 - 1e-9)).sum()) + 1

        varies = variance > CONSTANT**2 * self.moments.rows * mean.square()
        features = int(varies.sum())
        if features < 2:
            return dimension, float(components), math.nan
        scale = variance.rsqrt().where(varies, 0.0)
        # For each feature j this is the sum over i of |C_ij| / √(C_ii C_jj).
        correlation = (c.abs() * scale).T @ scale
        mean_correlation = (correlation.sum() - features) / (features * (features - 1))
        return dimension, float(components), mean_correlation.item()

    def _median_norm(self) -> float:
        """The middle, on a logarithmic scale, of the bin that holds the median (of an even number
        of rows, the lower of the middle two)."""
        if self._norm_max == 0:
            return 0.0
        place = int((self._histogram.cumsum(0) < (self.moments.rows + 1) // 2).sum())
        return 0.0 if place == 0 else 2 ** ((place + 0.5) / self.BINS - self.OCTAVES)
