"""Tiny models that turn images into codes of a vocabulary, like words."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from .family import END, IMAGE, START, text_config


def chameleon() -> nn.Module:
    codes = {
        "embed_dim": 8,
        "num_embeddings": 8,
        "latent_channels": 8,
        "resolution": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
    }
    names = {f"IMGIMG{letter}Z": 50 + i for i, letter in enumerate("ABCDEFGH")}
    config = hf.ChameleonConfig(
        **text_config(), vq_config=codes, vocabulary_map={"<image>": IMAGE, **names}
    )
    return hf.ChameleonForConditionalGeneration(config)


class FrozenCodes(hf.Emu3ForConditionalGeneration):
    """Emu3 with its image tokenizer in eval mode, as it is meant to be used. In training mode its
    batch norms would change with each forward."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.model.vqmodel.eval()
        return self


def emu3() -> nn.Module:
    codes = {
        "codebook_size": 8,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "num_res_blocks": 1,
        "channel_multiplier": [1, 1, 1],
        "attn_resolutions": [],
        "hidden_size": 32,
        "num_attention_heads": 2,
    }
    names = {f"<|visual token {i:06d}|>": 50 + i for i in range(8)} | {"<|extra_200|>": 58}
    config = hf.Emu3Config(
        vq_config=codes,
        text_config=text_config(attention_dropout=0.0),
        vocabulary_map={"<image>": IMAGE, **names},
        tie_word_embeddings=False,
    )
    return FrozenCodes(config)


def lined_image(height: int, width: int) -> list[int]:
    """Emu3: one code for 4 x 4 pixels, and one for the end of each line."""
    return [START, *[IMAGE] * (height // 4 * (width // 4 + 1)), END]


def lined_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    height, width = (max(s[i] for s in sizes) for i in (0, 1))
    pixels = torch.randn(len(sizes), 3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([list(s) for s in sizes])}
