"""The losses of one captured forward: rows, anchors and hidden states to the head, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pre_kernels.checks import debugging

from .capture import Seen
from .families import Parts
from .rows import Rows, find_rows, image_weights, pool, sample


@dataclass
class Terms:
    """The terms of one forward's loss: visual tokens, or images at level "image".

    Attributes:
        rows: bool mask of the hidden states' leading shape, at level "image" (images,); None for all.
        anchor: its leading shape + (z,), else (N, z) in the order of the rows.
        weight: of the rows' leading shape, or None for 1.
        divisor: of Σ weight · ℓ; None for Σ weight.
        count: what that is for all rows, drawn or not; 0-d.
        images: the number of each visual token's image, at level "image".
    """

    rows: Tensor | None
    anchor: Tensor
    weight: Tensor | None
    divisor: Tensor | float | None
    count: Tensor
    images: Tensor | None


@dataclass
class Objective:
    """What the heads predict and from which rows; the arguments of `apply_pre` of the same names."""

    parts: Parts
    layers: tuple[int, ...]
    anchor: str | Callable[[dict[str, Any], Tensor], Tensor]
    anchor_dim: int
    level: str
    mask_fn: Callable[[dict[str, Any]], Tensor] | None
    impl: str
    weighting: str = "token"
    fraction: float = 1.0

    def count(self, inputs: dict[str, Any]) -> Tensor:
        """What Σ over a forward with these arguments has to be divided by: its visual tokens, or its images; 0-d."""
        rows = find_rows(self.parts, inputs, self.mask_fn)
        if rows is None:
            return torch.zeros((), dtype=torch.long)
        if "image" in (self.level, self.weighting):
            return torch.tensor(rows.images(self.parts, inputs).unique().numel())
        return rows.mask.sum()

    def losses(
        self, seen: Seen, heads: Sequence[nn.Module], divisor: Tensor | float | None
    ) -> tuple[list[Tensor], Tensor]:
        """Each layer's loss, 0-d, on its own device: the mean over the terms, or Σ / `divisor`; and `count`."""
        rows = find_rows(self.parts, seen.inputs, self.mask_fn)
        hidden = [seen.layer(number) for number in self.layers]
        for tensor in hidden:
            no_dtensor("hidden", tensor)
        if rows is None:
            return self._without_rows(seen, heads, divisor), torch.zeros((), dtype=torch.long)

        rows.check(hidden[0])
        with torch.no_grad():
            terms = self._terms(seen, rows, divisor)
        found = []
        for number, state, head in zip(self.layers, hidden, heads, strict=True):
            device = state.device
            if terms.images is not None:
                state = pool(state, rows.mask.to(device), terms.images.to(device))
            with seen.autocast_of(number):
                options = self._options(state, terms.divisor, terms.weight)
                selected = None if terms.rows is None else terms.rows.to(device)
                found.append(head(state, terms.anchor.to(device), selected, **options))
        return found, terms.count

    def _terms(self, seen: Seen, rows: Rows, divisor: Tensor | float | None) -> Terms:
        terms = Terms(rows.mask, self._anchor(seen, rows), None, divisor, rows.mask.sum(), None)
        mask = rows.mask
        if self.level == "image":
            terms.images = rows.images(self.parts, seen.inputs)
            device = terms.anchor.device
            terms.anchor = pool(terms.anchor, mask.to(device), terms.images.to(device))
            mask, terms.rows = mask.new_ones(len(terms.anchor)), None
            terms.count = torch.tensor(len(mask))
        elif self.weighting == "image":
            terms.weight, terms.count = image_weights(mask, rows.images(self.parts, seen.inputs))
        if self.fraction < 1:
            terms.rows, share = sample(mask, self.fraction)
            if terms.anchor.shape[:-1] != mask.shape:
                terms.anchor = terms.anchor[terms.rows[mask].to(terms.anchor.device)]
            whole = terms.count if divisor is None else divisor
            terms.divisor = share * (whole.to(share.device) if torch.is_tensor(whole) else whole)
        return terms

    def _options(self, state: Tensor, divisor: Tensor | float | None, weight: Tensor | None) -> dict[str, Any]:
        """Keywords of a head's call on `state`, in the autocast state of the products."""
        device = state.device
        options: dict[str, Any] = {"impl": self.impl, "normalizer": divisor, "row_weight": weight}
        half = state.dtype.itemsize == 2 or torch.is_autocast_enabled(device.type)
        if self.fraction < 1 and not (self.impl == "auto" and half):
            # with a capacity so many rows are computed; without it "auto" takes what computes those there are, if half
            options["capacity"] = int(self.fraction * math.prod(state.shape[:-1])) + 1
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}

    def _without_rows(self, seen: Seen, heads: Sequence[nn.Module], divisor: Tensor | float | None) -> list[Tensor]:
        """0 for each layer, with the head in the graph: DDP waits for its gradients on every rank."""
        found = []
        for number, head in zip(self.layers, heads, strict=True):
            hidden = seen.layer(number)
            none = torch.zeros(0, dtype=torch.long, device=hidden.device)
            z = next(p.shape[0] for name, p in head.named_parameters() if name.split(".")[-1] == "w2")
            normalizer = divisor.to(hidden.device) if torch.is_tensor(divisor) else divisor
            with seen.autocast_of(number):
                found.append(head(hidden, hidden.new_zeros(0, z), none, impl=self.impl, normalizer=normalizer))
        return found

    def _anchor(self, seen: Seen, rows: Rows) -> Tensor:
        """(B, T, z), or (N, z) in the order of the rows."""
        if self.anchor == "pre_llm":
            return seen.anchor()
        if callable(self.anchor):
            found = self.anchor(seen.inputs, rows.mask)
            if not torch.is_tensor(found) or not found.is_floating_point():
                what = found.dtype if torch.is_tensor(found) else type(found).__name__
                raise TypeError(f"anchor: the callable returned {what}, want a floating point tensor")
        else:
            if not seen.projector:
                raise RuntimeError("anchor: the batch has images but the projector did not run; pass a callable anchor")
            found = rows.kept(self.parts.family.projector_rows(seen.projector, seen.inputs, self.parts.config))
        if found.shape[:-1] != rows.mask.shape and (found.dim() != 2 or len(found) != int(rows.mask.sum())):
            raise ValueError(
                f"anchor: got shape {tuple(found.shape)} for {int(rows.mask.sum())} visual tokens in a batch of "
                f"{tuple(rows.mask.shape)}; want (N, z) or (batch, tokens, z)"
            )
        if found.shape[-1] != self.anchor_dim:
            raise ValueError(f"anchor: got shape {tuple(found.shape)}, want width {self.anchor_dim} (anchor_dim)")
        if debugging():
            _check_finite(found, rows.mask)
        return found


def _check_finite(anchor: Tensor, mask: Tensor) -> None:
    """Reads the device, so under PRE_KERNELS_DEBUG=1 alone."""
    counted = anchor[mask.to(anchor.device)] if anchor.shape[:-1] == mask.shape else anchor
    bad = int((~counted.isfinite()).any(-1).sum())
    if bad:
        raise ValueError(f"anchor: got nan or inf in {bad} of {len(counted)} visual tokens, want finite values")


def no_dtensor(name: str, tensor: Tensor) -> None:
    """Raise a TypeError for a DTensor."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name}: got a DTensor, want plain tensors; call apply_pre before sharding (FSDP2), and not under "
                "tensor parallelism"
            )
