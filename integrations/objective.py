"""The losses of one captured forward: rows, anchors and hidden states to the head, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Seen
from .families import Parts
from .rows import Rows, find_rows, pool


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

    def count(self, inputs: dict[str, Any]) -> Tensor:
        """The number of terms (visual tokens, or images) in the loss of a forward with these arguments, 0-d."""
        rows = find_rows(self.parts, inputs, self.mask_fn)
        if rows is None:
            return torch.zeros((), dtype=torch.long)
        if self.level == "image":
            return torch.tensor(rows.images(self.parts, inputs).unique().numel())
        return rows.mask.sum()

    def losses(
        self, seen: Seen, heads: Sequence[nn.Module], divisor: Tensor | float | None
    ) -> tuple[list[Tensor], Tensor]:
        """Each layer's loss, 0-d, on its own device: the mean over the terms, or Σℓ / `divisor`; and their number."""
        rows = find_rows(self.parts, seen.inputs, self.mask_fn)
        hidden = [seen.layer(number) for number in self.layers]
        for tensor in hidden:
            no_dtensor("hidden", tensor)
        options: dict[str, Any] = {"impl": self.impl} | ({} if divisor is None else {"normalizer": divisor})
        if rows is None:
            return self._without_rows(seen, heads, options), torch.zeros((), dtype=torch.long)

        rows.check(hidden[0])
        numbers = None
        with torch.no_grad():
            anchor = self._anchor(seen, rows)
            if self.level == "image":
                numbers = rows.images(self.parts, seen.inputs)
                anchor = pool(anchor, rows.mask.to(anchor.device), numbers.to(anchor.device))
        count = rows.mask.sum() if numbers is None else torch.tensor(len(anchor))

        found = []
        for number, state, head in zip(self.layers, hidden, heads, strict=True):
            device = state.device
            selected: Tensor | None = rows.mask.to(device)
            if numbers is not None:
                state, selected = pool(state, rows.mask.to(device), numbers.to(device)), None
            with seen.autocast_of(number):
                found.append(head(state, anchor.to(device), selected, **_on(device, options)))
        return found, count

    def _without_rows(self, seen: Seen, heads: Sequence[nn.Module], options: dict[str, Any]) -> list[Tensor]:
        """0 for each layer, with the head in the graph: DDP waits for its gradients on every rank."""
        found = []
        for number, head in zip(self.layers, heads, strict=True):
            hidden = seen.layer(number)
            none = torch.zeros(0, dtype=torch.long, device=hidden.device)
            z = next(p.shape[0] for name, p in head.named_parameters() if name.split(".")[-1] == "w2")
            with seen.autocast_of(number):
                found.append(head(hidden, hidden.new_zeros(0, z), none, **_on(hidden.device, options)))
        return found

    def _anchor(self, seen: Seen, rows: Rows) -> Tensor:
        """(B, T, z), or (N, z) in the order of the rows."""
        if self.anchor == "pre_llm":
            return seen.anchor()
        if callable(self.anchor):
            found = self.anchor(seen.inputs, rows.mask)
            if not torch.is_tensor(found):
                raise TypeError(f"anchor: the callable returned {type(found).__name__}, want a tensor")
        else:
            if not seen.projector:
                raise RuntimeError("anchor: the batch has images but the projector did not run; pass a callable anchor")
            entered = torch.cat([each.reshape(-1, each.shape[-1]) for each in seen.projector])
            merge = self.parts.merge
            found = rows.kept(entered) if merge is None else merge.projected(seen.inputs, entered)
        if found.shape[:-1] != rows.mask.shape and (found.dim() != 2 or len(found) != int(rows.mask.sum())):
            raise ValueError(
                f"anchor: got shape {tuple(found.shape)} for {int(rows.mask.sum())} visual tokens in a batch of "
                f"{tuple(rows.mask.shape)}; want (N, z) or (batch, tokens, z)"
            )
        if found.shape[-1] != self.anchor_dim:
            raise ValueError(f"anchor: got shape {tuple(found.shape)}, want width {self.anchor_dim} (anchor_dim)")
        return found


def no_dtensor(name: str, tensor: Tensor) -> None:
    """Raise a TypeError for a DTensor."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name}: got a DTensor, want plain tensors; call apply_pre before sharding (FSDP2), and not under "
                "tensor parallelism"
            )


def _on(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
