"""The terms of one forward's loss: which visual tokens or images count, their targets, and the
divisor of their sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pre_kernels.checks import debugging

from .capture import CapturedForward
from .distributed import Group
from .families import Parts
from .tokens import VisualTokens, draw, drop_nonfinite, image_weights, pool, standardised


@dataclass(frozen=True)
class Target:
    """What a head predicts: from the states of which layer, the anchor, and its width."""

    layer: int
    anchor: str | Callable[[dict[str, Any], Tensor], Tensor]
    anchor_dim: int

    @property
    def key(self) -> Any:
        """The same for targets with the same anchor."""
        return self.anchor if isinstance(self.anchor, str) else id(self.anchor)


@dataclass(kw_only=True)
class TermOptions:
    """The options that decide on the terms. The attributes are the arguments of `apply_pre` of the
    same names; `targets` has one entry for each head."""

    parts: Parts
    targets: tuple[Target, ...]
    level: str
    mask_fn: Callable[[dict[str, Any]], Tensor] | None
    weighting: str = "token"
    fraction: float = 1.0
    group: Group | None = None
    nonfinite: str = "propagate"
    anchor_norm: str = "none"
    centered_over: Group | None = None  # None: as the terms are counted

    @property
    def by_image(self) -> bool:
        """Whether images are counted, not visual tokens."""
        return "image" in (self.level, self.weighting)


@dataclass(frozen=True)
class Terms:
    """The terms of one forward's loss: visual tokens, or images at level or weighting "image". All
    heads share them, and differ in the anchor.

    Attributes:
        tokens: bool mask (B, T) of the visual tokens that count.
        rows: bool mask with the hidden states' leading shape, at level "image" (images,); None:
            all rows.
        anchors: for each head that leading shape + (z,), or (N, z) in the order of the rows.
        weight: a weight for each row, with the rows' leading shape; None: 1.
        count: Σ weight over all rows, drawn or not; 0-d.
        full_divisor: Σ weight · ℓ over all rows is divided by this.
        drawn_divisor: Σ weight · ℓ over the drawn `rows` is divided by this; None: by Σ weight.
        images: at level "image", the index of each visual token's image.
        skipped: the number of visual tokens left out for a nan or inf, 0-d; None without
            `nonfinite="skip"`.
        counted: the number of terms before any were left out, which `Objective.count` should give
            for this forward; 0-d.
    """

    tokens: Tensor
    rows: Tensor | None
    anchors: list[Tensor]
    weight: Tensor | None
    count: Tensor
    full_divisor: Tensor | float
    drawn_divisor: Tensor | float | None
    images: Tensor | None
    skipped: Tensor | None
    counted: Tensor


@dataclass(frozen=True)
class _Tokens:
    """Visual tokens: their mask (B, T), their anchors (B, T, z) or (N, z) by `Target.key`, and the
    indices of their images (N,), if needed."""

    mask: Tensor
    anchors: dict[Any, Tensor]
    images: Tensor | None

    def finite(self, hidden: Sequence[Tensor]) -> _Tokens:
        """The tokens without a nan or inf in an anchor or in any of `hidden`."""
        mask = drop_nonfinite(self.mask, [*self.anchors.values(), *hidden])
        flat = any(anchor.shape[:-1] != mask.shape for anchor in self.anchors.values())
        if not flat and self.images is None:
            return _Tokens(mask, self.anchors, None)
        # This waits for the device; flat anchors and images have waited for it already.
        kept = mask[self.mask]
        return _Tokens(
            mask,
            _selected(self.anchors, mask, kept),
            None if self.images is None else self.images[kept.to(self.images.device)],
        )


@dataclass(frozen=True)
class _Undrawn:
    """All terms, before any are drawn: their mask, and attributes as in `Terms`."""

    mask: Tensor
    rows: Tensor | None
    anchors: dict[Any, Tensor]
    weight: Tensor | None
    count: Tensor


def _selected(anchors: dict[Any, Tensor], mask: Tensor, kept: Tensor) -> dict[Any, Tensor]:
    """`anchors` with only the `kept` rows of those that do not have the shape of `mask`."""
    return {
        key: rows if rows.shape[:-1] == mask.shape else rows[kept.to(rows.device)]
        for key, rows in anchors.items()
    }


def find_terms(
    options: TermOptions,
    seen: CapturedForward,
    visual: VisualTokens,
    hidden: Sequence[Tensor],
    divisor: Tensor | float | None,
) -> Terms:
    """The terms of a forward with the visual tokens `visual` and the layers' states `hidden`.

    Args:
        divisor: the full divisor. None: that of the group, or without one the forward's count.
    """
    distinct = {target.key: target for target in options.targets}
    spatial = options.anchor_norm == "spatial"
    tokens = _Tokens(
        visual.mask,
        {key: find_anchor(options, target, seen, visual) for key, target in distinct.items()},
        visual.images(options.parts, seen.inputs) if options.by_image or spatial else None,
    )
    skipped = counted = None
    if options.nonfinite == "skip":
        images = tokens.images if options.by_image else None
        counted = visual.mask.sum() if images is None else count_images(images)
        tokens = tokens.finite(hidden)
        skipped = visual.mask.sum() - tokens.mask.sum()
    anchors = tokens.anchors
    if spatial and tokens.images is not None:
        anchors = {k: standardised(a, tokens.mask, tokens.images) for k, a in anchors.items()}
    elif options.anchor_norm == "center":
        anchors = _centered(options, tokens, hidden[0].device, divisor)
    tokens = _Tokens(tokens.mask, anchors, tokens.images if options.by_image else None)

    undrawn = _undrawn(options, tokens)
    agreed = agreed_divisor(options.group, undrawn.count, hidden[0].device, divisor)
    full_divisor = undrawn.count if agreed is None else agreed
    rows = undrawn.rows
    anchors = undrawn.anchors
    drawn_divisor = agreed
    if options.fraction < 1:
        rows, drawn_fraction = draw(undrawn.mask, options.fraction)
        if any(anchor.shape[:-1] != rows.shape for anchor in anchors.values()):
            anchors = _selected(anchors, rows, rows[undrawn.mask])
        if torch.is_tensor(full_divisor):
            drawn_divisor = drawn_fraction * full_divisor.to(drawn_fraction.device)
        else:
            drawn_divisor = drawn_fraction * full_divisor
    return Terms(
        tokens=tokens.mask,
        rows=rows,
        anchors=[anchors[target.key] for target in options.targets],
        weight=undrawn.weight,
        count=undrawn.count,
        full_divisor=full_divisor,
        drawn_divisor=drawn_divisor,
        images=tokens.images if options.level == "image" else None,
        skipped=skipped,
        counted=undrawn.count if counted is None else counted,
    )


def _centered(
    options: TermOptions, tokens: _Tokens, device: torch.device, divisor: Tensor | float | None
) -> dict[Any, Tensor]:
    """The anchors less their mean over the visual tokens, in float32 at least; collective where
    terms are counted over processes."""
    wide = {}
    sums = []
    for key, rows in tokens.anchors.items():
        wide[key] = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if rows.shape[:-1] == tokens.mask.shape:
            # Other rows may hold nan.
            rows = torch.where(tokens.mask[..., None].to(rows.device), rows, 0)
        sums.append(rows.flatten(0, -2).sum(0, dtype=wide[key].dtype).to(device))
    packed = torch.cat([*sums, tokens.mask.sum()[None].to(device)])
    means = agreed_mean(options, packed, divisor).split([len(total) for total in sums])
    return {
        key: rows - mean.to(rows.device)
        for (key, rows), mean in zip(wide.items(), means, strict=True)
    }


def agreed_mean(options: TermOptions, packed: Tensor, divisor: Tensor | float | None) -> Tensor:
    """Sums ÷ their count, the last of `packed`, both added up over the processes whose terms are
    counted together; every one of them has to ask."""
    over = options.centered_over or (options.group if divisor is None else Group("world"))
    if over is not None:
        packed = over.mean(packed)
    return packed[:-1] / packed[-1]


def count_images(numbers: Tensor) -> Tensor:
    """The number of different images in the indices of visual tokens' images, 0-d."""
    return torch.tensor(numbers.unique().numel())


def agreed_divisor(
    group: Group | None, count: Tensor, device: torch.device, divisor: Tensor | float | None
) -> Tensor | float | None:
    """`divisor` if given, else that of the group, for which every process has to ask; None without
    both."""
    if divisor is not None or group is None:
        return divisor
    return group.divisor(count.to(device, non_blocking=True))


def find_anchor(
    options: TermOptions, target: Target, seen: CapturedForward, visual: VisualTokens
) -> Tensor:
    """The targets of the visual tokens: (B, T, z), or (N, z) in the order of the tokens."""
    if target.anchor == "pre_llm":
        return seen.anchor()
    if callable(target.anchor):
        anchor = target.anchor(seen.inputs, visual.mask)
        if not torch.is_tensor(anchor) or not anchor.is_floating_point():
            what = anchor.dtype if torch.is_tensor(anchor) else type(anchor).__name__
            raise TypeError(f"anchor: the callable returned {what}, want a floating point tensor")
    else:
        anchor = _projector_anchor(options.parts, seen, visual)
    if anchor.shape[:-1] != visual.mask.shape and (
        anchor.dim() != 2 or len(anchor) != int(visual.mask.sum())
    ):
        raise ValueError(
            f"anchor: got shape {tuple(anchor.shape)} for {int(visual.mask.sum())} visual tokens "
            f"in a batch of {tuple(visual.mask.shape)}; want (N, z) or (batch, tokens, z), such as "
            f"({int(visual.mask.sum())}, z)"
        )
    if anchor.shape[-1] != target.anchor_dim:
        raise ValueError(
            f"anchor: got shape {tuple(anchor.shape)}, want width {target.anchor_dim} "
            f"(anchor_dim); pass anchor_dim={anchor.shape[-1]} to apply_pre"
        )
    if debugging() and options.nonfinite != "skip":
        _check_finite(anchor, visual.mask)
    return anchor


def _undrawn(options: TermOptions, tokens: _Tokens) -> _Undrawn:
    mask = tokens.mask
    anchors = tokens.anchors
    images = tokens.images
    if images is None:
        return _Undrawn(mask, mask, anchors, None, mask.sum())
    if options.level != "image":
        weight, count = image_weights(mask, images)
        return _Undrawn(mask, mask, anchors, weight, count)
    pooled = {
        key: pool(anchor, mask.to(anchor.device), images.to(anchor.device))
        for key, anchor in anchors.items()
    }
    number = len(next(iter(pooled.values())))
    return _Undrawn(mask.new_ones(number), None, pooled, None, torch.tensor(number))


def _projector_anchor(parts: Parts, seen: CapturedForward, visual: VisualTokens) -> Tensor:
    """The inputs that the projector maps to the visual tokens, (N, z)."""
    if not seen.projector:
        raise RuntimeError(
            "anchor: the batch has images but the projector did not run; pass a callable anchor"
        )
    if not all(torch.is_tensor(rows) for rows in seen.projector):
        raise TypeError(
            f"anchor: the projector got a {type(seen.projector[0]).__name__}, not the tensor of "
            'its rows; use "pre_llm", or pass a callable anchor'
        )
    rows = parts.family.projector_rows(seen.projector, seen.inputs, parts.config)
    if parts.merge is not None:
        return parts.merge.projected(seen.inputs, rows)
    return visual.kept(rows)


def _check_finite(anchor: Tensor, mask: Tensor) -> None:
    """Raise for anchors that are not finite. This reads the device, so it is called only under
    PRE_KERNELS_DEBUG=1."""
    rows = anchor[mask.to(anchor.device)] if anchor.shape[:-1] == mask.shape else anchor
    bad = int((~rows.isfinite()).any(-1).sum())
    if bad:
        raise ValueError(
            f"anchor: got nan or inf in {bad} of {len(rows)} visual tokens, want finite values, or "
            'apply_pre(nonfinite="skip")'
        )
