"""A vision-language model without transformers, with its layers at an unusual path."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .models import DEPTH, IMAGE


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = 1 + index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x).cumsum(1)) / self.scale


class HomeMade(nn.Module):
    """A vision-language model without transformers. Its blocks are at an unusual path, and images
    are merged before the first block."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8, **config)
        self.words = nn.Embedding(64, 8)
        self.eye = nn.Linear(5, 8)
        self.trunk = nn.Module()
        self.trunk.blocks = nn.ModuleList(Block(i) for i in range(DEPTH))
        self.out = nn.Linear(8, 64)

    def forward(
        self,
        ids: torch.Tensor,
        patches: torch.Tensor,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        x = self.words(ids) if inputs_embeds is None else inputs_embeds
        x = x.masked_scatter((ids == IMAGE)[..., None], self.eye(patches))
        for block in self.trunk.blocks:
            x = block(x)
        logits = self.out(x)
        return {"logits": logits} | (
            {} if labels is None else {"loss": F.cross_entropy(logits.flatten(0, 1), labels)}
        )


def home_made(**config: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.tensor([[3, IMAGE, IMAGE, 4, 5], [IMAGE, 6, IMAGE, 7, 8]])
    inputs = {"ids": ids, "patches": torch.randn(4, 5), "labels": torch.randint(50, (10,))}
    return HomeMade(**config), inputs
