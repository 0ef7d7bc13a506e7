"""The exponential moving average of a module that trains, as an encoder of anchors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .optimizers import parameters


class Average:
    """A frozen copy of `source` that moves to `decay * copy + (1 - decay) * source` after each
    optimizer step, without a host sync. It is in float32 at least: half precision would round the
    moves away.

    Raises:
        ValueError: if nothing in `source` trains.
        TypeError: if its parameters are sharded, also at a step.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        if not any(p.requires_grad for p in source.parameters()):
            raise ValueError(f"ema: got {decay} for an encoder that does not train, want None")
        self.source = source
        self.dtype = _whole(source)[0].dtype
        self.copy = copy.deepcopy(source).eval().requires_grad_(False)
        if self.dtype.itemsize == 2:
            self.copy.float()
        self._move = get_ema_multi_avg_fn(decay)
        self._behind = False  # whether a step began after the last move

    def stepped(self, optimizer: Any, model: nn.Module) -> None:
        """A step of `optimizer` begins. It counts if it has parameters of the source, or none of
        `model`: engines step copies of them."""
        # In a forward FSDP has whole parameters in place of those it splits.
        own = _whole(self.source)
        held = {id(p) for p in parameters(optimizer)}
        if held & {*map(id, own)} or not held & {*map(id, model.parameters())}:
            self.update()
            self._behind = True

    @torch.no_grad()
    def update(self) -> nn.Module:
        """The copy, after the move of the last step."""
        if self._behind:
            self._behind = False
            own = list(self.copy.parameters())
            source = zip(self.source.parameters(), own, strict=True)
            self._move(own, [p.to(mean) for p, mean in source], 0)
            for mean, buffer in zip(self.copy.buffers(), self.source.buffers(), strict=True):
                mean.copy_(buffer)
        return self.copy


def _whole(module: nn.Module) -> list[nn.Parameter]:
    every = list(module.parameters())
    marks = ("full_tensor", "ds_id", "_fsdp_flattened")  # FSDP2 and others, ZeRO-3, FSDP1
    if not every or any(hasattr(p, mark) for p in every for mark in marks):
        raise TypeError(
            f"encoder: got {type(module).__name__} with sharded parameters, which ema cannot "
            "average; want them whole on each process (DDP, ZeRO-2), or ema=None"
        )
    return every
