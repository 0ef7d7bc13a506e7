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
from .tokens import VisualTokens, draw, drop_nonfinite, image_weights, normalised, pool


@dataclass(frozen=True)
class Target:
    """What a head predicts: from the states of which layer, the anchor, and its width."""

    layer: int
    anchor: str | Callable[[dict[str, Any], Tensor], Tensor]
    anchor_dim: int


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
    gram_over: str | None = None  # None without a Gram loss

    @property
    def by_image(self) -> bool:
        """Whether images are counted, not visual tokens."""
        return "image" in (self.level, self.weighting)

    @property
    def over_images(self) -> str:
        """The option by which a term depends on several tokens, as in a call of `apply_pre`; empty
        without one."""
        if self.gram_over is not None:
            return 'loss="gram"'
        options = {"level": "image", "weighting": "image", "anchor_norm": "spatial"}
        names = [f'{n}="{v}"' for n, v in options.items() if getattr(self, n) == v]
        return next(iter(names), "")


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
        gram_images: `images` of the heads' calls with the loss "gram", else None.
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
    gram_images: Tensor | str | None
    skipped: Tensor | None
    counted: Tensor


def _selected(anchors: list[Tensor], mask: Tensor, kept: Tensor) -> list[Tensor]:
    """`anchors` with only the `kept` rows of those that do not have the shape of `mask`."""
    return [a if a.shape[:-1] == mask.shape else a[kept.to(a.device)] for a in anchors]


def find_terms(
    options: TermOptions,
    seen: CapturedForward,
    visual: VisualTokens,
    hidden: Sequence[Tensor],
    divisor: Tensor | float | None,
    over: Group | None = None,
) -> Terms:
    """The terms of a forward with the visual tokens `visual` and the layers' states `hidden`.

    Args:
        divisor: the full divisor. None: that of the group, or without one the forward's count.
        over: the processes over which anchors are centered. None: this one.
    """
    distinct: list[Any] = []  # each anchor is computed once
    anchors: list[Tensor] = []
    for target in options.targets:
        if target.anchor not in distinct:
            distinct.append(target.anchor)
            anchors.append(find_anchor(options, target, seen, visual))
    spatial = options.anchor_norm == "spatial"
    images = None
    if options.by_image or spatial or options.gram_over == "image":
        images = visual.images(options.parts, seen.inputs)
    mask = visual.mask
    skipped = counted = None
    if options.nonfinite == "skip":
        counted = mask.sum() if images is None or not options.by_image else count_images(images)
        mask = drop_nonfinite(visual.mask, [*anchors, *hidden])
        if images is not None or any(anchor.shape[:-1] != mask.shape for anchor in anchors):
            # This waits for the device; flat anchors and images have waited for it already.
            kept = mask[visual.mask]
            anchors = _selected(anchors, mask, kept)
            images = None if images is None else images[kept.to(images.device)]
        skipped = visual.mask.sum() - mask.sum()
    if options.anchor_norm != "none":
        device = hidden[0].device
        numbers = images if spatial else None
        anchors = [normalised(a.to(device), mask, numbers, over) for a in anchors]

    rows: Tensor | None = mask
    weight = None
    count = mask.sum()
    terms = mask
    if options.level == "image" and images is not None:
        anchors = [pool(a, mask.to(a.device), images.to(a.device)) for a in anchors]
        terms = mask.new_ones(len(anchors[0]))
        rows = None
        count = torch.tensor(len(anchors[0]))
    elif options.by_image and images is not None:
        weight, count = image_weights(mask, images)
    agreed = agreed_divisor(options.group, count, hidden[0].device, divisor)
    full_divisor = count if agreed is None else agreed
    drawn_divisor = agreed
    if options.fraction < 1:
        rows, drawn_fraction = draw(terms, options.fraction)
        if any(anchor.shape[:-1] != rows.shape for anchor in anchors):
            anchors = _selected(anchors, rows, rows[terms])
        if torch.is_tensor(full_divisor):
            drawn_divisor = drawn_fraction * full_divisor.to(drawn_fraction.device)
        else:
            drawn_divisor = drawn_fraction * full_divisor
    return Terms(
        tokens=mask,
        rows=rows,
        anchors=[anchors[distinct.index(target.anchor)] for target in options.targets],
        weight=weight,
        count=count,
        full_divisor=full_divisor,
        drawn_divisor=drawn_divisor,
        images=images if options.level == "image" else None,
        gram_images=images if options.gram_over == "image" else options.gram_over,
        skipped=skipped,
        counted=count if counted is None else counted,
    )


def no_terms(
    options: TermOptions,
    hidden: Sequence[Tensor],
    divisor: Tensor | float | None,
    over: Group | None,
) -> Terms:
    """The terms of a forward without visual tokens, with the arguments of `find_terms`: none.

    Where processes count together, they wait for each other's numbers, so this one has to take part
    with zeros."""
    zero = torch.zeros((), dtype=torch.long)
    anchors: list[Any] = []
    for target in options.targets:
        if options.anchor_norm == "center" and over is not None and target.anchor not in anchors:
            anchors.append(target.anchor)
            over.mean(hidden[0].new_zeros(1, target.anchor_dim + 1))
    agreed = agreed_divisor(options.group, zero, hidden[0].device, divisor)
    no_rows = hidden[0].new_zeros(0, dtype=torch.long)
    return Terms(
        tokens=no_rows,
        rows=no_rows,
        anchors=[
            h.new_zeros(0, t.anchor_dim) for h, t in zip(hidden, options.targets, strict=True)
        ],
        weight=None,
        count=zero,
        full_divisor=1.0 if agreed is None else agreed,
        drawn_divisor=agreed,
        images=None,
        gram_images=None if options.gram_over is None else "batch",
        skipped=zero if options.nonfinite == "skip" else None,
        counted=zero,
    )


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
