"""Passes over rows in PyTorch, for the steps on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def part(rows: Tensor, start: int, stop: int) -> Tensor:
    """Return rows [start, stop), or the tensor itself if that is all of them: in a small call a
    view costs as much as a pass over the rows."""
    return rows if stop - start == rows.shape[0] else rows[start:stop]


def take(source: Tensor, index: Tensor | None, start: int, stop: int, out: Tensor) -> Tensor:
    """Copy rows [start, stop) of a selection of `source` to the first rows of `out`, and return
    these."""
    out = part(out, 0, stop - start)
    if index is None:
        return out.copy_(source[start:stop])
    index = part(index, start, stop)
    if source.dtype == out.dtype:
        return torch.index_select(source, 0, index, out=out)
    return out.copy_(source.index_select(0, index))


def add_rows(total: Tensor, y: Tensor, first: bool) -> None:
    """Compute total += Σ y, or total = Σ y if `first`."""
    if first:
        torch.sum(y, 0, dtype=total.dtype, out=total)
    else:
        total.add_(y.sum(0, dtype=total.dtype))


def factor(upstream: Tensor | None) -> Tensor | float | None:
    """Return `upstream`, on a CPU as a number, because reading it there does not make anyone
    wait."""
    return upstream.item() if upstream is not None and upstream.device.type == "cpu" else upstream


def scaled(
    grad: Tensor, scale: Tensor | float | None, dtype: torch.dtype, in_place: bool = False
) -> Tensor:
    if scale is None:
        return grad.to(dtype)
    if not in_place or grad.dtype != dtype:
        return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
    return grad if isinstance(scale, float) and scale == 1 else grad.mul_(scale)
