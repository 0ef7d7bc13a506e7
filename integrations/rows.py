"""Which rows of a batch are visual tokens, and which image each belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import Parts, placeholders, runs


@dataclass
class Rows:
    """The visual tokens of a batch.

    Attributes:
        mask: bool (B, T), those that count: placeholders that are not masked as padding.
        places: bool (B, T) for each kind, before the attention mask; empty if a mask_fn found them.
        numbers: integer (B, T) from a mask_fn that numbers the images.
    """

    mask: Tensor
    places: dict[str, Tensor]
    numbers: Tensor | None = None

    def images(self, parts: Parts, inputs: Mapping[str, Any]) -> Tensor:
        """The number of each row's image (N,), batch-major, not necessarily without gaps."""
        if self.numbers is not None:
            return self.numbers[self.mask]
        if parts.merge is not None:
            return parts.merge.numbers(inputs)[self.mask]
        if not self.places:
            return runs(self.mask, "", inputs, parts.config)
        whole = torch.zeros(self.mask.shape, dtype=torch.long, device=self.mask.device)
        offset = 0
        for kind, places in self.places.items():
            found = parts.family.images(places, kind, inputs, parts.config)
            whole[places] = found + offset
            offset += len(found)
        return whole[self.mask]

    def kept(self, rows: Tensor) -> Tensor:
        """Of one row per placeholder (M, z), all images' first and then all videos', those (N, z) that count."""
        kinds = list(self.places.values()) if self.places else [self.mask]
        sizes = [int(places.sum()) for places in kinds]
        if len(rows) != sum(sizes):
            raise ValueError(
                f"anchor: {len(rows)} rows entered the projector for {sum(sizes)} visual tokens, so they do not "
                "correspond one to one; pass a callable anchor"
            )
        if len(kinds) == 1:
            return rows[self.mask[kinds[0]].to(rows.device)]
        whole = rows.new_empty(*self.mask.shape, rows.shape[-1])
        for places, part in zip(kinds, rows.split(sizes), strict=True):
            whole[places.to(rows.device)] = part
        return whole[self.mask.to(rows.device)]

    def check(self, hidden: Tensor) -> None:
        """The mask must be of the hidden states' leading shape."""
        if self.mask.shape != hidden.shape[:-1]:
            raise ValueError(
                f"rows: the visual mask has shape {tuple(self.mask.shape)}, the hidden states {tuple(hidden.shape)}; "
                "pass a mask_fn that returns a mask of the hidden states' leading shape"
            )


def find_rows(parts: Parts, inputs: dict[str, Any], mask_fn: Callable[[dict[str, Any]], Tensor] | None) -> Rows | None:
    """The visual tokens of a forward with these arguments; None if it has no vision input.

    Raises:
        ValueError: without `input_ids` and `mask_fn`.
        TypeError: if `mask_fn` returns no bool or integer tensor.
    """
    if mask_fn is not None:
        found = mask_fn(inputs)
        if not torch.is_tensor(found) or found.is_floating_point() or found.is_complex():
            what = found.dtype if torch.is_tensor(found) else type(found).__name__
            raise TypeError(f"mask_fn: returned {what}, want a bool or integer tensor (batch, tokens)")
        return Rows(found, {}) if found.dtype == torch.bool else Rows(found != 0, {}, found)
    if parts.merge is not None:
        merged = parts.merge.mask(inputs)
        return None if merged is None else Rows(merged, {})
    places = placeholders(parts, inputs)
    if not places:
        return None
    mask = torch.stack(list(places.values())).any(0)
    attention = inputs.get("attention_mask")
    if torch.is_tensor(attention) and attention.shape == mask.shape:
        mask = mask & attention.bool().to(mask.device)
    return Rows(mask, places)


def finite(mask: Tensor, anchor: Tensor, hidden: Sequence[Tensor]) -> Tensor:
    """`mask` (B, T) without the rows that have a nan or inf in `anchor` or in one of `hidden`; no host sync.

    Args:
        mask: bool, of N rows.
        anchor: (B, T, z), or (N, z) in the order of the rows.
        hidden: each (B, T, d).
    """
    kept = mask
    for rows in (anchor, *hidden):
        # the largest magnitude: one pass, and nan and inf come through it
        good = torch.linalg.vector_norm(rows.detach(), ord=math.inf, dim=-1).isfinite().to(mask.device)
        kept = kept & (good if good.shape == mask.shape else torch.ones_like(mask).masked_scatter(mask, good))
    return kept


def pool(rows: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
    """The mean (K, d) over each image's rows: of (B, T, d) under `mask`, or of (N, d); in `rows`' dtype."""
    if rows.shape[:-1] == mask.shape:
        rows = rows[mask]
    _, index, sizes = numbers.unique(return_inverse=True, return_counts=True)
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(len(sizes), rows.shape[-1], dtype=wide, device=rows.device).index_add(0, index, rows.to(wide))
    return (total / sizes[:, None]).to(rows.dtype)


def image_weights(mask: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T): 1 / the tokens of its image for each row under `mask`, 0 elsewhere; and the number of images, 0-d."""
    _, index, sizes = numbers.unique(return_inverse=True, return_counts=True)
    weights = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    weights[mask] = 1 / sizes[index].to(mask.device, weights.dtype)
    return weights, torch.tensor(len(sizes))


def sample(mask: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """`mask` with max(1, round(`fraction` · N)) of its N rows, every such subset being as likely; and their share of N.

    One draw from the default generator of the mask's device; no host sync. The share is 0-d; 1 without rows.
    """
    if mask.numel() == 0:
        return mask, torch.ones((), device=mask.device)
    count = mask.sum().float()
    size = (count * fraction).round().clamp(min=1)
    top = 2**62  # so many values that ties don't matter
    draws = torch.randint(top, mask.shape, device=mask.device).masked_fill(~mask, top)
    last = draws.flatten().sort().values.gather(0, size.long().view(1) - 1)
    return mask & (draws <= last), size / count.clamp(min=1)
