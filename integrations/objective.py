"""The losses of one captured forward: rows, anchors and hidden states to the head, layer by
layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pre_kernels.checks import debugging
from pre_kernels.head import Uncast

from .capture import Seen
from .distributed import Group
from .families import Parts
from .metrics import sample_cosine
from .tokens import Rows, find_rows, finite, image_weights, pool, sample, warn_of_images


@dataclass
class Terms:
    """The terms of one forward's loss: visual tokens, or images at level "image".

    Attributes:
        tokens: bool mask (B, T) of the visual tokens that count.
        rows: bool mask of the hidden states' leading shape, at level "image" (images,); None for
            all.
        anchor: its leading shape + (z,), else (N, z) in the order of the rows.
        weight: of the rows' leading shape, or None for 1.
        count: Σ weight over all rows, drawn or not; 0-d.
        whole: what Σ weight · ℓ over all rows is divided by, None for `count`.
        divisor: what it is divided by over `rows`, None for Σ weight.
        images: the number of each visual token's image, at level "image".
        skipped: the number of visual tokens left out for a nan or inf, 0-d; None where they are
            not.
        counted: as in `Losses`; None for `count`.
    """

    tokens: Tensor
    rows: Tensor | None
    anchor: Tensor
    weight: Tensor | None
    count: Tensor
    whole: Tensor | float | None = None
    divisor: Tensor | float | None = None
    images: Tensor | None = None
    skipped: Tensor | None = None
    counted: Tensor | None = None


@dataclass
class Losses:
    """What one forward gave.

    Attributes:
        layers: each layer's loss, 0-d, on its own device.
        divisor: what they are Σ weight · ℓ over all terms divided by; 0-d or a number.
        terms: this forward's terms, visual tokens or images; 0-d.
        tokens: the number of visual tokens, 0-d.
        cosines: (2,) for each layer, the sum and the number of sampled cosines; empty where they
            are the loss.
        skipped: as in `Terms`.
        counted: what `Objective.count` should have said of this forward: its terms, before any were
            left out; 0-d.
        empty: 0-d bool, whether there were images but no visual token, masked or not; None without
            images, and where `mask_fn` or the model's own merge finds the visual tokens.
    """

    layers: list[Tensor]
    divisor: Tensor | float
    terms: Tensor
    tokens: Tensor
    cosines: list[Tensor]
    skipped: Tensor | None
    counted: Tensor
    empty: Tensor | None = None


@dataclass
class Objective:
    """What the heads predict and from which rows; the arguments of `apply_pre` of the same
    names."""

    parts: Parts
    layers: tuple[int, ...]
    anchor: str | Callable[[dict[str, Any], Tensor], Tensor]
    anchor_dim: int
    level: str
    mask_fn: Callable[[dict[str, Any]], Tensor] | None
    impl: str
    loss: str = "cosine"
    weighting: str = "token"
    fraction: float = 1.0
    group: Group | None = None
    nonfinite: str = "propagate"

    def count(self, inputs: dict[str, Any]) -> Tensor:
        """What Σ over a forward with these arguments has to be divided by: its visual tokens, or
        its images; 0-d."""
        rows = find_rows(self.parts, inputs, self.mask_fn)
        if rows is None:
            return torch.zeros((), dtype=torch.long)
        if "image" in (self.level, self.weighting):
            return torch.tensor(rows.images(self.parts, inputs).unique().numel())
        return rows.mask.sum()

    def losses(
        self,
        seen: Seen,
        heads: Sequence[nn.Module],
        divisor: Tensor | float | None,
        alone: bool = False,
    ) -> Losses:
        """The heads' losses of a forward: Σ / `divisor`; without one, the mean over the forward's
        or group's terms.

        `alone`: the forward's, whatever the group, whose other processes may have a divisor.
        """
        if alone:
            return replace(self, group=None).losses(seen, heads, divisor)
        rows = find_rows(self.parts, seen.inputs, self.mask_fn)
        hidden = [seen.layer(number) for number in self.layers]
        for tensor in hidden:
            no_dtensor("hidden", tensor)
        if rows is None:
            return self._without_rows(seen, hidden, heads, divisor)

        rows.check(hidden[0])
        warn_of_images(self.parts, rows, seen.inputs)
        with torch.no_grad():
            terms = self._terms(seen, rows, hidden, divisor)
        whole = terms.count if terms.whole is None else terms.whole
        counted = terms.count if terms.counted is None else terms.counted
        found = Losses(
            [], whole, terms.count, terms.tokens.sum(), [], terms.skipped, counted, rows.empty
        )
        for number, state, head in zip(self.layers, hidden, heads, strict=True):
            device = state.device
            if terms.images is not None:
                state = pool(state, terms.tokens.to(device), terms.images.to(device))
            with _products(seen, number, state, head):
                options = self._options(state, terms.divisor, terms.weight)
                selected = None if terms.rows is None else terms.rows.to(device)
                target = terms.anchor.to(device)
                found.layers.append(head(state, target, selected, **options))
                if self.loss != "cosine":
                    found.cosines.append(sample_cosine(head, state, target, selected, self.impl))
        return found

    def _terms(
        self, seen: Seen, rows: Rows, hidden: list[Tensor], divisor: Tensor | float | None
    ) -> Terms:
        mask, anchor, images, skipped, counted = (
            rows.mask,
            self._anchor(seen, rows),
            None,
            None,
            None,
        )
        if "image" in (self.level, self.weighting):
            images = rows.images(self.parts, seen.inputs)
        if self.nonfinite == "skip":
            counted = mask.sum() if images is None else torch.tensor(images.unique().numel())
            mask, skipped = finite(mask, anchor, hidden), mask.sum()
            skipped = skipped - mask.sum()
            flat = anchor.shape[:-1] != mask.shape
            if flat or images is not None:  # both have read the host anyway
                kept = mask[rows.mask]
                anchor = anchor[kept.to(anchor.device)] if flat else anchor
                images = None if images is None else images[kept.to(images.device)]
        terms = Terms(mask, mask, anchor, None, mask.sum(), skipped=skipped, counted=counted)
        if images is not None and self.level == "image":
            terms.images = images
            where = terms.anchor.device
            terms.anchor = pool(anchor, mask.to(where), images.to(where))
            mask, terms.rows = mask.new_ones(len(terms.anchor)), None
            terms.count = torch.tensor(len(mask))
        elif images is not None:
            terms.weight, terms.count = image_weights(mask, images)
        terms.whole = terms.divisor = self._whole(terms.count, hidden[0].device, divisor)
        if self.fraction < 1:
            terms.rows, share = sample(mask, self.fraction)
            if terms.anchor.shape[:-1] != mask.shape:
                terms.anchor = terms.anchor[terms.rows[mask].to(terms.anchor.device)]
            whole = terms.count if terms.whole is None else terms.whole
            terms.divisor = share * (whole.to(share.device) if torch.is_tensor(whole) else whole)
        return terms

    def _whole(
        self, count: Tensor, device: torch.device, divisor: Tensor | float | None
    ) -> Tensor | float | None:
        """`divisor` if it is given, else the group's, of which every process has to ask."""
        if divisor is not None or self.group is None:
            return divisor
        return self.group.divisor(count.to(device, non_blocking=True))

    def _options(
        self, state: Tensor, divisor: Tensor | float | None, weight: Tensor | None
    ) -> dict[str, Any]:
        """Keywords of a head's call on `state`, in the autocast state of the products."""
        device = state.device
        options: dict[str, Any] = {"impl": self.impl, "normalizer": divisor, "row_weight": weight}
        half = state.dtype.itemsize == 2 or torch.is_autocast_enabled(device.type)
        if self.fraction < 1 and not (self.impl == "auto" and half):
            # with a capacity so many rows are computed; without it "auto" takes what computes those
            # there are, if half
            options["capacity"] = int(self.fraction * math.prod(state.shape[:-1])) + 1
        return {
            name: Uncast(value.to(device)) if torch.is_tensor(value) else value
            for name, value in options.items()
        }

    def _without_rows(
        self,
        seen: Seen,
        hidden: list[Tensor],
        heads: Sequence[nn.Module],
        divisor: Tensor | float | None,
    ) -> Losses:
        """0 for each layer, with the head in the graph: DDP waits for its gradients on every
        rank."""
        zero = torch.zeros((), dtype=torch.long)
        whole = self._whole(zero, hidden[0].device, divisor)
        skipped = zero if self.nonfinite == "skip" else None
        found = Losses([], 1.0 if whole is None else whole, zero, zero, [], skipped, zero)
        for number, state, head in zip(self.layers, hidden, heads, strict=True):
            none, target = state.new_zeros(0, dtype=torch.long), state.new_zeros(0, self.anchor_dim)
            normalizer = whole.to(state.device) if torch.is_tensor(whole) else whole
            with _products(seen, number, state, head):
                found.layers.append(
                    head(state, target, none, impl=self.impl, normalizer=normalizer)
                )
                if (
                    self.loss != "cosine"
                ):  # a sharded head gathers its parameters at each call, on all ranks
                    found.cosines.append(
                        sample_cosine(head, state[..., :0, :], target, None, self.impl)
                    )
        return found

    def _anchor(self, seen: Seen, rows: Rows) -> Tensor:
        """(B, T, z), or (N, z) in the order of the rows."""
        if self.anchor == "pre_llm":
            return seen.anchor()
        if callable(self.anchor):
            found = self.anchor(seen.inputs, rows.mask)
            if not torch.is_tensor(found) or not found.is_floating_point():
                what = found.dtype if torch.is_tensor(found) else type(found).__name__
                raise TypeError(
                    f"anchor: the callable returned {what}, want a floating point tensor"
                )
        else:
            if not seen.projector:
                raise RuntimeError(
                    "anchor: the batch has images but the projector did not run; pass a callable anchor"
                )
            if not all(torch.is_tensor(rows) for rows in seen.projector):
                raise TypeError(
                    f"anchor: the projector got a {type(seen.projector[0]).__name__}, not the tensor of its rows; use "
                    '"pre_llm", or pass a callable anchor'
                )
            entered = self.parts.family.projector_rows(
                seen.projector, seen.inputs, self.parts.config
            )
            merge = self.parts.merge
            found = rows.kept(entered) if merge is None else merge.projected(seen.inputs, entered)
        if found.shape[:-1] != rows.mask.shape and (
            found.dim() != 2 or len(found) != int(rows.mask.sum())
        ):
            raise ValueError(
                f"anchor: got shape {tuple(found.shape)} for {int(rows.mask.sum())} visual tokens in a batch of "
                f"{tuple(rows.mask.shape)}; want (N, z) or (batch, tokens, z)"
            )
        if found.shape[-1] != self.anchor_dim:
            raise ValueError(
                f"anchor: got shape {tuple(found.shape)}, want width {self.anchor_dim} (anchor_dim)"
            )
        if debugging() and self.nonfinite != "skip":
            _check_finite(found, rows.mask)
        return found


def _check_finite(anchor: Tensor, mask: Tensor) -> None:
    """Reads the device, so under PRE_KERNELS_DEBUG=1 alone."""
    counted = anchor[mask.to(anchor.device)] if anchor.shape[:-1] == mask.shape else anchor
    bad = int((~counted.isfinite()).any(-1).sum())
    if bad:
        raise ValueError(
            f"anchor: got nan or inf in {bad} of {len(counted)} visual tokens, want finite values"
        )


def _products(
    seen: Seen, number: int, hidden: Tensor, head: nn.Module
) -> AbstractContextManager[Any]:
    """The layer's autocast state; for master weights over a layer in half precision, autocast to
    the layer's dtype."""
    half = hidden.dtype.itemsize == 2 and not seen.autocast[number][1]
    if half and next(head.parameters()).dtype == torch.float32:
        return torch.autocast(hidden.device.type, dtype=hidden.dtype)
    return seen.autocast_of(number)


def no_dtensor(name: str, tensor: Any) -> None:
    """Raise a TypeError for a DTensor."""
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name}: got a DTensor with placements {tensor.placements}, want plain tensors: under tensor parallelism "
            "the layers must exchange whole hidden states (no sequence parallelism between them), or read another layer"
        )
