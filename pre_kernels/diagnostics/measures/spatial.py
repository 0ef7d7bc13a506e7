"""Patch structure without masks: whether similarity still falls with distance, and the similarity
map of one patch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import inputs


class SpatialContrast(NamedTuple):
    """Two mean cosine similarities, each in -1..1, and their ratio. A value is nan if there was
    nothing to average."""

    near: float
    """The mean over neighbours."""
    far: float
    """The mean over distant patches."""
    ratio: float
    """near / far."""


def spatial_contrast(
    features: Tensor, grid: tuple[int, int], radius: int | None = None
) -> SpatialContrast:
    """How much more similar neighbouring patches are than distant ones: a substitute for the
    contrast ratio without masks.

    With s(i, j) the cosine similarity of patches i and j of one image, on a grid of rows and
    columns:

        near  = mean of s(i, j) over i, j that share a side (4-neighbours)
        far   = mean of s(i, j) over i, j more than `radius` rows, or columns, apart
        ratio = mean near / mean far

    The means of near and far are over images, each counting once. The ratio has no unit. 1 means
    that position leaves no trace in similarity; larger is more structure. The ratio is nan unless
    the mean of far is positive.

    Why it is a substitute: two patches that share a side mostly show one object, and patches far
    apart mostly do not. So near follows cohesion, far follows coupling, and similarity that spills
    over borders (arXiv 2603.20808) pulls the ratio to 1. Objects found by clustering the anchor
    would come closer to the definition, but would favour layer 0 by construction and depend on a
    seed and a number of clusters. The ratio is still a proxy: use it to compare layers and models
    on the same images and the same radius. Its value is not a contrast ratio. Similarity that comes
    only from position, such as that of position embeddings, counts as structure.

    Scaling a patch, rotating the feature space and turning or mirroring the image change nothing.
    Reordering the patches changes the result, because it breaks the neighbourhood. So does moving
    the origin.

    The cost is O(patches · width · columns), whatever the radius, and memory for one row of
    patches. near is a sum of products of neighbours. far is the square of the sum of all unit
    vectors, minus the product of each vector with the sum over its window, which running sums over
    rows provide.

    Args:
        features: (images, patches, width), or (patches, width) for one image. Floating point,
            computed in float64.
        grid: (rows, columns). patches = rows · columns, row by row.
        radius: in patches. None: a quarter of the shorter side, rounded down, at least 1.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """
    spatial = Spatial(radius)
    spatial.update(features, grid)
    return spatial.result()


class Spatial:
    """`spatial_contrast` over a stream of images of any grids. Keeps four numbers, however many
    images come.

    `update` takes the same arguments as the function. If it raises, the sums are unchanged.
    """

    def __init__(self, radius: int | None = None) -> None:
        if radius is not None:
            inputs.check_positive("radius", radius)
        self.radius = radius
        # Sums over images, and how many images had such pairs.
        self._near = 0.0
        self._with_near = 0
        self._far = 0.0
        self._with_far = 0

    def update(self, features: Tensor, grid: tuple[int, int]) -> None:
        """Add images of one grid."""
        x = inputs.images(features)
        grid = check_grid(grid, x.shape[1])
        for part in x.split(inputs.chunk(x)):
            self.add(inputs.unit(part), grid)

    def add(self, unit: Tensor, grid: tuple[int, int]) -> None:
        """Add images whose arguments are checked: unit vectors (images, patches, width) in
        float64."""
        x = unit.unflatten(1, grid)
        rows, columns = grid
        radius = max(1, min(grid) // 4) if self.radius is None else self.radius
        band = _band(columns, radius).to(x)

        near, close = x.new_zeros(()), x.new_zeros(())
        # For each column, the sum of the unit vectors in the rows within the radius.
        window = torch.zeros_like(x[:, 0])
        for row in range(-radius, rows):
            if row + radius < rows:
                window += x[:, row + radius]
            if row < 0:
                continue
            if row - radius > 0:
                window -= x[:, row - radius - 1]
            close += ((x[:, row] @ window.mT) * band).sum()
            near += (x[:, row, 1:] * x[:, row, :-1]).sum()
            if row:
                near += (x[:, row] * x[:, row - 1]).sum()
        far = unit.sum(1).square().sum() - close

        sides = rows * (columns - 1) + (rows - 1) * columns
        # The number of distant pairs. Each is counted twice, as in `far`.
        close_pairs = int(_band(rows, radius).sum() * _band(columns, radius).sum())
        pairs = (rows * columns) ** 2 - close_pairs
        sums = torch.stack([near, far]).tolist()
        if sides:
            self._near += sums[0] / sides
            self._with_near += len(x)
        if pairs:
            self._far += sums[1] / pairs
            self._with_far += len(x)

    def merge(self, other: Spatial) -> None:
        """Add the images that another `Spatial` has seen. It has to have the same radius."""
        self._near += other._near
        self._with_near += other._with_near
        self._far += other._far
        self._with_far += other._with_far

    def result(self) -> SpatialContrast:
        """The means and the ratio over all images so far."""
        near = self._near / self._with_near if self._with_near else math.nan
        far = self._far / self._with_far if self._with_far else math.nan
        return SpatialContrast(near, far, near / far if far > 0 else math.nan)


def similarity_map(features: Tensor, patch: int, grid: tuple[int, int] | None = None) -> Tensor:
    """Cosine similarity of one patch with all patches of its image: the heat map of arXiv
    2603.20808.

    Values are in -1..1, in float32 (float64 for float64 features), computed in float64. The patch
    itself has 1. If it is a patch of zeros, the map is 0 everywhere. Scaling a patch and rotating
    the feature space change nothing. Reordering the patches reorders the map.

    Args:
        features: (..., patches, width), floating point: one image, several images or layers.
        patch: the number of the patch, in 0..patches - 1, the same for every leading index.
        grid: (rows, columns): the result then has shape (..., rows, columns) instead of (...,
            patches).

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """
    inputs.check_floating("features", features)
    if features.dim() < 2 or features.numel() == 0:
        raise ValueError(
            f"features: got shape {tuple(features.shape)}, want (..., patches, width), not empty"
        )
    patches = features.shape[-2]
    if isinstance(patch, bool) or not isinstance(patch, int) or not 0 <= patch < patches:
        raise ValueError(f"patch: got {patch!r}, want an integer in 0..{patches - 1}")
    if grid is not None:
        grid = check_grid(grid, patches)
    inputs.check_finite("features", features)
    x = inputs.unit(features)
    similarity = (x @ x[..., patch, :, None]).squeeze(-1).clamp(-1, 1)
    similarity = similarity.to(torch.promote_types(features.dtype, torch.float32))
    return similarity if grid is None else similarity.unflatten(-1, grid)


def check_grid(grid: object, patches: int) -> tuple[int, int]:
    if (
        not isinstance(grid, tuple | list)
        or len(grid) != 2
        or not all(isinstance(side, int) and side > 0 for side in grid)
        or grid[0] * grid[1] != patches
    ):
        raise ValueError(
            f"grid: got {grid!r}, want (rows, columns), two positive integers whose product is "
            f"{patches}"
        )
    return grid[0], grid[1]


def _band(side: int, radius: int) -> Tensor:
    """Which positions along a side are at most `radius` apart, (side, side) bool."""
    place = torch.arange(side)
    return (place[:, None] - place).abs() <= radius
