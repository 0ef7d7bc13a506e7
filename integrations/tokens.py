"""Which tokens of a batch are visual, and which image each of them belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distributed import Group
from .families import GENERIC, Parts
from .image_rules import runs
from .model_config import Inputs
from .visible import visible

# Warn only after this many forwards with images but without visual tokens, because the first few
# forwards may have dummy images that the text does not mention.
PATIENCE = 4


@dataclass
class VisualTokens:
    """The visual tokens of a batch.

    Attributes:
        mask: bool (B, T), the tokens that count: placeholders that are not masked as padding.
        places: bool (B, T) for each kind of placeholder, before the attention mask. Empty if a
            mask_fn or the model's own merge found the tokens.
        numbers: integer (B, T), the number of each token's image, from a mask_fn that gives it.
        empty: 0-d bool, whether there are images but no placeholder, masked or not. None if a
            mask_fn or the model's own merge found the tokens.
    """

    mask: Tensor
    places: dict[str, Tensor]
    numbers: Tensor | None = None
    empty: Tensor | None = None

    def images(self, parts: Parts, inputs: Inputs) -> Tensor:
        """The number (N,) of each visual token's image, in batch-major order. Numbers may have
        gaps.

        Raises:
            ValueError: if the images cannot be told apart.
        """
        if self.numbers is not None:
            return self.numbers[self.mask]
        if parts.merge is not None:
            return parts.merge.numbers(inputs)[self.mask]
        if not self.places:
            return runs(self.mask, "", inputs, parts.config)
        numbers = torch.zeros(self.mask.shape, dtype=torch.long, device=self.mask.device)
        offset = 0
        for kind, places in self.places.items():
            of_kind = parts.family.images(places, kind, inputs, parts.config)
            numbers[places] = of_kind + offset
            offset += len(of_kind)
        return numbers[self.mask]

    def kept(self, rows: Tensor) -> Tensor:
        """The rows (N, z) of the tokens that count, from one row per placeholder (M, z), first
        those of all images, then those of all videos.

        Raises:
            ValueError: if the number of rows is not that of the placeholders.
        """
        kinds = list(self.places.values()) if self.places else [self.mask]
        sizes = [int(places.sum()) for places in kinds]
        if len(rows) != sum(sizes):
            raise ValueError(
                f"anchor: {len(rows)} rows entered the projector for {sum(sizes)} visual tokens, "
                "so they do not correspond one to one; pass a callable anchor"
            )
        if len(kinds) == 1:
            return rows[self.mask[kinds[0]].to(rows.device)]
        whole = rows.new_empty(*self.mask.shape, rows.shape[-1])
        for places, part in zip(kinds, rows.split(sizes), strict=True):
            whole[places.to(rows.device)] = part
        return whole[self.mask.to(rows.device)]

    def check(self, hidden: Tensor) -> None:
        """Raise a ValueError if the mask does not have the leading shape of `hidden`."""
        if self.mask.shape != hidden.shape[:-1]:
            raise ValueError(
                f"rows: the visual mask has shape {tuple(self.mask.shape)}, the hidden states "
                f"{tuple(hidden.shape)}; pass a mask_fn that returns a mask of the hidden states' "
                "leading shape"
            )


def find_tokens(
    parts: Parts, inputs: dict[str, Any], mask_fn: Callable[[dict[str, Any]], Tensor] | None
) -> VisualTokens | None:
    """The visual tokens of a forward with these arguments. None if it has no vision input.

    Raises:
        ValueError: if there are neither `input_ids` nor a `mask_fn`.
        TypeError: if `mask_fn` does not return a bool or integer tensor.
    """
    if mask_fn is not None:
        returned = mask_fn(inputs)
        if not torch.is_tensor(returned) or returned.is_floating_point() or returned.is_complex():
            what = returned.dtype if torch.is_tensor(returned) else type(returned).__name__
            raise TypeError(
                f"mask_fn: returned {what}, want a bool or integer tensor (batch, tokens)"
            )
        if returned.dtype == torch.bool:
            return VisualTokens(returned, {})
        return VisualTokens(returned != 0, {}, numbers=returned.long())
    if parts.merge is not None:
        merged = parts.merge.mask(inputs)
        return None if merged is None else VisualTokens(merged, {})
    places = placeholders(parts, inputs)
    if not places:
        return None
    mask = torch.stack(list(places.values())).any(0)
    empty = ~mask.any()
    flags = inputs.get("image_flags")
    # InternVL's own code gives a dummy image, which has no tokens, the flag 0.
    if torch.is_tensor(flags):
        empty = empty & flags.to(mask.device).any()
    kept = visible(inputs, mask.shape, parts.notices)
    if kept is not None:
        mask = mask & kept.to(mask.device)
    return VisualTokens(mask, places, empty=empty)


def placeholders(parts: Parts, inputs: Inputs) -> dict[str, Tensor]:
    """Masks (B, T) of the image and video tokens in `input_ids`, for each kind that the batch has
    inputs of. Empty for a text-only batch.

    An image token without an image is text. In a family that is not listed, images may come in an
    argument of any name, so there a warning says this once.

    Raises:
        ValueError: if there are no `input_ids`.
    """
    precomputed = inputs.get("mm_encoder_outputs") or {}
    named = {"image": parts.family.image_inputs, "video": parts.family.video_inputs}
    tokens = parts.tokens
    present = [
        kind
        for kind, names in named.items()
        if tokens[kind]
        and any(map(_holds, (precomputed.get(kind), *(inputs.get(name) for name in names))))
    ]
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError(
            "input_ids: the forward got none, so its visual tokens cannot be found; pass mask_fn= "
            "to apply_pre: it gets the forward's arguments as a dict and returns a bool mask "
            "(batch, tokens)"
        )
    if not present and parts.family is GENERIC:
        _warn_of_tokens(parts, inputs, ids)
    places = {}
    for kind in present:
        first, *others = tokens[kind]
        places[kind] = ids == first
        for other in others:
            places[kind] = places[kind] | (ids == other)
    return places


def _holds(value: Any) -> bool:
    """Whether an argument contains images. Some collators give an empty tensor or list instead of
    None."""
    if torch.is_tensor(value):
        return value.numel() > 0
    return value is not None and not (isinstance(value, (list, tuple)) and not value)


def _warn_of_tokens(parts: Parts, inputs: Inputs, ids: Tensor) -> None:
    """Warn of image tokens without images. Only the 1st, 2nd, 4th, 8th, ... text-only forward of a
    training is checked.

    Each check waits for the device. This schedule makes about 20 checks in a training, and one of
    them comes soon after the first images, however much text came before.
    """
    name = "image tokens without images"
    if name in parts.notices.given or capturing():
        return
    turn = parts.notices.turn(name)
    if turn & (turn - 1):
        return
    count = int(torch.isin(ids, ids.new_tensor(sum(parts.tokens.values(), ()))).sum())
    if count:
        known = ", ".join((*parts.family.image_inputs, *parts.family.video_inputs))
        parts.notices.warn(name, count=count, known=known, got=", ".join(inputs))


def warn_of_images(parts: Parts, visual: VisualTokens, inputs: Inputs) -> None:
    """Warn if the first `PATIENCE` forwards with images of a training had no visual token.

    The first forward that has one ends the checks, so a healthy training waits for the device only
    once.
    """
    name = "images without image tokens"
    if visual.empty is None or name in parts.notices.given or capturing():
        return
    if not visual.empty:
        parts.notices.settle(name)
    elif (turn := parts.notices.turn(name)) == PATIENCE:
        known = (*parts.family.image_inputs, *parts.family.video_inputs)
        got = ", ".join(n for n in known if inputs.get(n) is not None)
        tokens = ", ".join(str(token) for ids in parts.tokens.values() for token in ids)
        parts.notices.warn(name, got=got or "images", tokens=tokens, count=turn - 1)


def capturing() -> bool:
    """Whether a CUDA graph is being captured. The device must not be read then."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def drop_nonfinite(mask: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """`mask` (B, T) without the rows that have a nan or inf in one of `tensors`. Does not wait for
    the device.

    Args:
        mask: bool (B, T) that marks N rows.
        tensors: (B, T, width), or (N, width) in the order of the rows.
    """
    kept = mask
    for rows in tensors:
        # The largest magnitude needs one pass, and is nan or inf if any element is.
        largest = torch.linalg.vector_norm(rows.detach(), ord=math.inf, dim=-1)
        finite = largest.isfinite().to(mask.device)
        if finite.shape != mask.shape:
            finite = torch.ones_like(mask).masked_scatter(mask, finite)
        kept = kept & finite
    return kept


def indices(mask: Tensor, count: int) -> Tensor:
    """The flat indices of the `count` rows that `mask` selects. Does not wait for the device."""
    ranks = torch.arange(1, count + 1, device=mask.device)
    return torch.searchsorted(mask.flatten().cumsum(0), ranks)


def normalised(rows: Tensor, mask: Tensor, numbers: Tensor | None, over: Group | None) -> Tensor:
    """`rows` less their mean over the tokens of `mask`, those of all processes of `over`. With the
    `numbers` (N,) of the tokens' images: (x - mean) / (std + 1e-6) over each image, per channel,
    with the std of a sample (iREPA, arXiv 2512.10794). In float32 at least; no host sync.

    `rows` and `mask` are those of `pool`.
    """
    x = rows.flatten(0, -2).to(torch.promote_types(rows.dtype, torch.float32))
    valid = x.new_ones(len(x), dtype=torch.bool)
    if rows.shape[:-1] == mask.shape:
        valid = mask.to(x.device).flatten()
    index = torch.zeros_like(valid, dtype=torch.long)
    if numbers is not None:
        ordered, order = numbers.to(x.device).sort()
        rank = (ordered[1:] != ordered[:-1]).cumsum(0)
        index = index.masked_scatter(valid, torch.zeros_like(order).scatter(0, order[1:], rank))

    def total(values: Tensor) -> Tensor:
        if numbers is None:
            return values.sum(0, keepdim=True)
        # There are at most as many images as tokens.
        sums = values.new_zeros(len(numbers) + 1, values.shape[1])
        return sums.index_add(0, index, values)

    # Rows of text may hold nan.
    sums = total(torch.cat([x.where(valid[:, None], 0), valid[:, None].to(x.dtype)], 1))
    if over is not None and numbers is None:
        sums = over.mean(sums)
    counts = sums[:, -1:]
    mean = sums[:, :-1] / counts
    x = (x - (mean if numbers is None else mean[index])).where(valid[:, None], 0)
    if numbers is not None:
        std = (total(x.square()) / (counts - 1).clamp(min=1)).sqrt()
        x = x / (std + 1e-6)[index]
    return x.view(rows.shape)


def pool(rows: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
    """The mean (K, d) over the rows of each of K images, in the dtype of `rows`.

    Args:
        rows: (B, T, d), of which `mask` selects N, or these N rows (N, d).
        mask: bool (B, T).
        numbers: (N,), the image of each row.
    """
    if rows.shape[:-1] == mask.shape:
        rows = rows[mask]
    _, index, sizes = numbers.unique(return_inverse=True, return_counts=True)
    sum_dtype = torch.promote_types(rows.dtype, torch.float32)
    zeros = torch.zeros(len(sizes), rows.shape[-1], dtype=sum_dtype, device=rows.device)
    mean: Tensor = zeros.index_add(0, index, rows.to(sum_dtype)) / sizes[:, None]
    return mean.to(rows.dtype)


def image_weights(mask: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, T) under which every image counts the same, and the number of images (0-d).

    The weight of a row under `mask` is 1 / (number of tokens of its image); all others are 0.
    """
    _, index, sizes = numbers.unique(return_inverse=True, return_counts=True)
    weights = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    weights[mask] = 1 / sizes[index].to(mask.device, weights.dtype)
    return weights, torch.tensor(len(sizes))


def draw(mask: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Draw max(1, round(`fraction` · N)) of the N rows of `mask`, each subset with the same
    probability.

    Takes one draw from the default generator of the mask's device, and does not wait for it.

    Returns:
        The mask of the drawn rows, and the drawn fraction of N (0-d), which is 1 without rows.
    """
    if mask.numel() == 0:
        return mask, torch.ones((), device=mask.device)
    count = mask.sum().float()
    size = (count * fraction).round().clamp(min=1)
    top = 2**62  # with this many values ties are negligible
    draws = torch.randint(top, mask.shape, device=mask.device).masked_fill(~mask, top)
    last = draws.flatten().sort().values.gather(0, size.long().view(1) - 1)
    return mask & (draws <= last), size / count.clamp(min=1)
