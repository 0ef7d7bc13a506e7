"""The losses of one captured forward: its terms and the layers' hidden states go to the heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pre_kernels.head import Uncast

from .anchors import EncoderAnchor
from .averaging import Average
from .capture import CapturedForward
from .deferred import Deferred
from .distributed import Group
from .metrics import sample_cosine
from .terms import TermOptions, Terms, count_images, find_terms, no_terms
from .tokens import find_tokens, indices, pool, warn_of_images


@dataclass(kw_only=True)
class Objective(TermOptions):
    """What the heads predict and from which layers' states. The attributes are the arguments of
    `apply_pre` of the same names."""

    impl: str
    loss: str = "cosine"

    @property
    def layers(self) -> tuple[int, ...]:
        """The number of each head's layer."""
        return tuple(target.layer for target in self.targets)

    @property
    def averages(self) -> list[Average]:
        """The moving averages among the anchors."""
        anchors: list[Any] = [t.anchor for t in self.targets if isinstance(t.anchor, EncoderAnchor)]
        return list(dict.fromkeys(a.average for a in anchors if a.average is not None))

    def settings(self, several: bool) -> dict[str, Any]:
        """See `PreHandle.settings`. `several`: whether the head is a ModuleList."""
        anchors = [t.anchor if isinstance(t.anchor, str) else "callable" for t in self.targets]
        return {
            "layers": list(self.layers),
            "several": several,
            "level": self.level,
            # At level "image" images weigh the same whatever `weighting` says.
            "weighting": "image" if self.level == "image" else self.weighting,
            "anchor_norm": self.anchor_norm,
            "anchor": ", ".join(anchors if len({*anchors}) > 1 else anchors[:1]),
        }

    def count(self, inputs: dict[str, Any]) -> Tensor:
        """The number of terms (visual tokens or images) of a forward with these arguments, 0-d."""
        visual = find_tokens(self.parts, inputs, self.mask_fn)
        if visual is None:
            return torch.zeros((), dtype=torch.long)
        if self.by_image:
            return count_images(visual.images(self.parts, inputs))
        return visual.mask.sum()

    def losses(
        self,
        seen: CapturedForward,
        heads: Sequence[nn.Module],
        deferred: Deferred | None = None,
    ) -> tuple[list[Tensor], list[Tensor], Terms]:
        """The losses of a forward, one for each head.

        Args:
            deferred: the micro-batch of a trainer that the forward is part of. Its divisor divides
                the sum of the terms; without one this is the mean over the terms of the forward, or
                of the group's forwards.

        Returns:
            The losses, 0-d, each on its layer's device: Σ weight · ℓ over all terms divided by
                `full_divisor`.
            For each head the sum and the number of sampled cosines, (2,); empty with the cosine
                loss.
            The terms. A forward without tokens has none, and its losses are 0 with the heads in the
                graph, because DDP waits for the heads' gradients on every rank.
        """
        divisor = None if deferred is None else deferred.divisor
        over = self.group
        own = self
        if deferred is not None and (deferred.ungrouped or divisor is not None):
            # A divisor is that of all processes that train together, also if only others have one.
            over = None if deferred.alone else Group("world")
        if deferred is not None and deferred.ungrouped:
            own = replace(self, group=None)
        visual = find_tokens(self.parts, seen.inputs, self.mask_fn)
        hidden = [seen.layer(number) for number in self.layers]
        for tensor in hidden:
            no_dtensor("hidden", tensor)
        if visual is not None:
            visual.check(hidden[0])
            warn_of_images(self.parts, visual, seen.inputs)
        with torch.no_grad():
            if visual is None:
                terms = no_terms(own, hidden, divisor, over)
            else:
                terms = find_terms(own, seen, visual, hidden, divisor, over)
        selection = terms.rows
        if selection is not None:
            flat = [anchor for anchor in terms.anchors if anchor.shape[:-1] != selection.shape]
            if flat:
                # The host knows N, so the mask becomes indices once for all heads, without a wait.
                selection = indices(selection, len(flat[0]))
        losses = []
        cosines = []
        for target, state, head, anchor in zip(
            self.targets, hidden, heads, terms.anchors, strict=True
        ):
            device = state.device
            if terms.images is not None:
                state = pool(state, terms.tokens.to(device), terms.images.to(device))
            rows = None if selection is None else selection.to(device)
            anchor = anchor.to(device)
            with _products(seen, target.layer, state, head):
                losses.append(head(state, anchor, rows, **self._options(state, rows, terms)))
                # A sharded head gathers its parameters at each call, so every rank has to call it
                # equally often.
                if self.loss != "cosine":
                    mask = None if terms.rows is None else terms.rows.to(device)
                    cosines.append(sample_cosine(head, state, anchor, mask, self.impl))
        return losses, cosines, terms

    def _options(self, state: Tensor, rows: Tensor | None, terms: Terms) -> dict[str, Any]:
        """Keywords of a head's call on `state`, in the autocast state of the matmuls."""
        device = state.device
        options: dict[str, Any] = {
            "impl": self.impl,
            "normalizer": terms.drawn_divisor,
            "row_weight": terms.weight,
            "images": terms.gram_images,
        }
        half = state.dtype.itemsize == 2 or torch.is_autocast_enabled(device.type)
        masked = rows is not None and rows.dtype == torch.bool
        if self.fraction < 1 and masked and not (self.impl == "auto" and half):
            # A capacity makes "blas" compute exactly that many rows. In half precision leave it
            # out: impl="auto" then picks "triton", which skips unselected rows by itself.
            options["capacity"] = int(self.fraction * math.prod(state.shape[:-1])) + 1
        return {
            name: Uncast(value.to(device)) if torch.is_tensor(value) else value
            for name, value in options.items()
        }


def _products(
    seen: CapturedForward, number: int, hidden: Tensor, head: nn.Module
) -> torch.autocast:
    """The layer's autocast state. For float32 master weights over a layer in half precision:
    autocast to the layer's dtype."""
    half = hidden.dtype.itemsize == 2 and not seen.autocast[number][1]
    if half and next(head.parameters()).dtype == torch.float32:
        return torch.autocast(hidden.device.type, dtype=hidden.dtype)
    return seen.autocast_of(number)


def no_dtensor(name: str, tensor: Any) -> None:
    """Raise a TypeError for a DTensor."""
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name}: got a DTensor with placements {tensor.placements}, want plain tensors: under "
            "tensor parallelism the layers must exchange whole hidden states (no sequence "
            "parallelism between them), or read another layer"
        )
