"""The checks of values that need the selection: they read the device, or know N."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import debugging
from .problem import Problem

# Up to this many row indices Python counts as fast as torch does.
FEW = 256


def row_values(problem: Problem) -> None:
    """Check range and uniqueness of integer rows. This reads the device, so it happens only on the
    CPU or under PRE_KERNELS_DEBUG=1."""
    rows = problem.rows
    total = problem.hidden.shape[0]
    if rows is None or problem.masked or not rows.numel():
        return
    if rows.device.type != "cpu" and not debugging():
        return
    few = rows.tolist() if rows.numel() <= FEW else None
    low, high = (min(few), max(few)) if few else map(int, rows.aminmax())
    if low < 0 or high >= total:
        raise ValueError(
            f"rows: got indices in {low}..{high}, want 0..{total - 1} (hidden has {total} rows; "
            "with shape (B, T, d) token t of sample b is row b * T + t)"
        )
    distinct = len(set(few)) if few else int(torch.bincount(rows).count_nonzero())
    if distinct < rows.numel():
        raise ValueError(
            f"rows: got {rows.numel()} indices of which {distinct} are distinct, want no "
            "duplicates (rows.unique() has none)"
        )


def selected_count(problem: Problem, count: int) -> None:
    """Compare a mask's count with the capacity and with compact anchors and weights, once the host
    knows the count."""
    capacity = problem.options.capacity
    if capacity is not None and count > capacity:
        raise ValueError(
            f"capacity: got {capacity}, want at least the {count} rows that the mask selects"
        )
    for name, value, compact in (
        ("anchor", problem.anchor, problem.options.anchor_compact),
        ("row_weight", problem.weight, problem.options.weight_compact),
        ("images", problem.images, problem.options.images_compact),
    ):
        if compact and value is not None and value.shape[0] != count:
            raise ValueError(
                f"{name}: got {value.shape[0]} rows, want one for each of the {count} selected "
                "rows, or all rows, in hidden's leading shape"
            )


def image_sizes(numbers: Tensor) -> list[int]:
    """The number of rows of each image, from the numbers of the selected rows' images (N,). This
    waits for the device."""
    values: list[int]
    counts: list[int]
    values, counts = (x.tolist() for x in numbers.unique_consecutive(return_counts=True))
    for value, count in zip(values, counts, strict=True):
        if count == 1:
            raise ValueError(
                f"images: got one selected row of image {value}, want at least two visual tokens "
                "of each image with loss='gram', because the Gram matrix of one is always 1"
            )
    if len(set(values)) < len(values):
        raise ValueError(
            "images: got the rows of an image in several places of the selection, want them in "
            "succession"
        )
    return counts
