"""Checks that the diagnostics share, and the scaling to unit length that most of them start
with."""

from __future__ import annotations

import torch
from torch import Tensor


def describe(value: object) -> str:
    return str(value.dtype) if torch.is_tensor(value) else type(value).__name__


def check_floating(name: str, value: object) -> None:
    if not torch.is_tensor(value) or not value.is_floating_point():
        raise TypeError(
            f"{name}: got {describe(value)}, want a floating point tensor ({name}.float() is one)"
        )


def check_finite(name: str, value: Tensor) -> None:
    # The sum is cheaper than a check of each number, and it is not finite if one of them is not. It
    # can also overflow when all are finite, so only then each number is checked.
    total = value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
    if not total.isfinite() and not value.isfinite().all():
        raise ValueError(
            f"{name}: got nan or infinite values, want finite ones; {name}.isfinite() is False "
            "where they are"
        )


def check_rows(name: str, value: object, want: str = "(N, width)") -> None:
    """TypeError or ValueError unless `value` is a finite floating point matrix that is not
    empty."""
    check_floating(name, value)
    assert torch.is_tensor(value)
    if value.dim() != 2 or value.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want {want}, not empty")
    check_finite(name, value)


def check_aligned(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if len(value) != len(other):
        raise ValueError(
            f"{name}: got {len(value)} rows, want as many as {other_name} has, {len(other)}"
        )


def check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, want a positive integer")


def images(features: object, name: str = "features") -> Tensor:
    """`features` as (images, patches, width), checked. (patches, width) is one image."""
    check_floating(name, features)
    assert torch.is_tensor(features)
    if features.dim() == 2:
        features = features[None]
    if features.dim() != 3 or features.numel() == 0:
        raise ValueError(
            f"{name}: got shape {tuple(features.shape)}, want (images, patches, width), not empty"
        )
    check_finite(name, features)
    return features


def unit(features: Tensor) -> Tensor:
    """The rows scaled to length 1, in float64 and in new memory. A row of zeros stays zero."""
    x = features.detach().to(torch.float64, copy=True)
    tiny = torch.finfo(x.dtype).tiny
    if features.dtype == x.dtype:
        # Squares of float64 numbers can overflow or underflow. Squares of narrower types cannot,
        # because they are computed in float64.
        x /= x.abs().amax(-1, keepdim=True).clamp(min=tiny)
    return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=tiny))


def chunk(features: Tensor) -> int:
    """How many images of (images, patches, width) fit into about 128 MiB in float64."""
    return max(1, 2**24 // (features.shape[1] * features.shape[2]))
