"""The mean cosine between predictions and anchors, for the logs of losses that are none: from a few
rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLE = 256


@torch.no_grad()
def sample_cosine(
    head: nn.Module, hidden: Tensor, anchor: Tensor, mask: Tensor | None, impl: str
) -> Tensor:
    """The sum and the number (2,) of the cosines of at most `SAMPLE` rows, spread evenly; no host
    sync.

    Args:
        head: a `PreHead`.
        hidden: (..., d).
        anchor: hidden's leading shape + (z,), else (N, z) in selection order.
        mask: bool of hidden's leading shape with N rows set, or None for all rows.
    """
    flat, target = hidden.flatten(0, -2), anchor.flatten(0, -2)
    if mask is None:
        mask = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    size = min(SAMPLE, len(target))
    if size == 0:  # a row that does not count
        size, mask = 1, mask.new_zeros(1)
        flat, target = flat.new_zeros(1, flat.shape[-1]), target.new_zeros(1, target.shape[-1])
    places = mask.flatten().cumsum(0)
    count = places[-1]
    ranks = (
        torch.arange(size, device=flat.device) * (count / size).clamp(min=1)
    ).long()  # which of the N
    valid = ranks < count
    rows = torch.searchsorted(places, ranks + 1).clamp(max=len(flat) - 1)
    matching = rows if len(target) == len(flat) else ranks.clamp(max=len(target) - 1)
    cosines = -head(flat[rows], target[matching], None, loss="cosine", reduction="none", impl=impl)
    # what stands in for a row that does not count may be nan
    return torch.stack([cosines.where(valid, 0).sum(), valid.sum().to(cosines.dtype)])
