"""A vision-language model that is not Hugging Face's, with the structure of nanoVLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

IMAGE = 9  # stands for a visual token


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        return x + self.mlp(self.norm1(x)).tanh(), cache


class Language(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


class Small(nn.Module):
    """A vision-language model without a config. Its argument for labels is `targets`, and it
    returns (logits, loss)."""

    def __init__(self, width: int = 12, depth: int = 4) -> None:
        super().__init__()
        self.vision = nn.Linear(6, width)
        self.decoder = Language(width, depth)
        self.tokenizer = SimpleNamespace(image_token_id=IMAGE)

    def forward(self, input_ids: Tensor, images: Tensor, targets: Any = None) -> tuple[Tensor, Any]:
        x = self.decoder.embed(input_ids)
        x = x.masked_scatter((input_ids == IMAGE)[..., None], self.vision(images))
        logits = self.decoder(x)
        loss = (
            None
            if targets is None
            else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        )
        return logits, loss

    def save_pretrained(self, folder: Path) -> None:
        save_model(self, str(folder / "model.safetensors"))


def small() -> tuple[Small, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = torch.tensor([[1, IMAGE, IMAGE, 4, 5], [IMAGE, 2, 3, 6, 7]])
    return Small(), {
        "input_ids": ids,
        "images": torch.randn(3, 6),
        "targets": torch.randint(0, 9, (2, 5)),
    }


OPTIONS = {
    "layer": 2,
    "layers": "decoder.blocks",
    "mask_fn": lambda inputs: inputs["input_ids"] == IMAGE,
}
