"""The real parts from which the model is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Llm:
    name: str
    file: str
    prompt: str
    image_token: int


LLMS = {
    "smollm2": Llm(
        "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf", "<|im_start|>user\n", 16
    )
}


@dataclass(frozen=True)
class Pieces:
    folder: Path

    def llm(self, llm: Llm) -> Path:
        return self.folder / llm.file

    def encoder(self) -> dict[str, Any]:
        import torch

        weights: dict[str, Any] = torch.load(
            self.folder / "efficientnet-lite0.pth", weights_only=True
        )
        return weights

    @property
    def photographs(self) -> Path:
        return self.folder / "stamps"
