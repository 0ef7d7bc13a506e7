"""Tiny models that cut an image into tiles of one size; each tile has the same number of visual
tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from .family import END, IMAGE, SQUARE_TOWER, START, TOWER, VIDEO, WIDTH, text, text_config, tower

PINPOINTS = [[8, 8], [8, 16], [16, 8]]


def llava_next() -> nn.Module:
    config = hf.LlavaNextConfig(
        vision_config=tower(hf.CLIPVisionConfig),
        text_config=hf.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def llava_onevision() -> nn.Module:
    config = hf.LlavaOnevisionConfig(
        vision_config=tower(hf.SiglipVisionConfig),
        text_config=hf.Qwen2Config(**text_config()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def llava_next_video() -> nn.Module:
    config = hf.LlavaNextVideoConfig(
        vision_config=tower(hf.CLIPVisionConfig),
        text_config=hf.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return hf.LlavaNextVideoForConditionalGeneration(config)


def internvl() -> nn.Module:
    config = hf.InternVLConfig(
        vision_config={**TOWER, "image_size": [8, 8], "patch_size": [2, 2]},
        text_config=hf.Qwen2Config(**text_config()),
        image_token_id=IMAGE,
    )
    return hf.InternVLForConditionalGeneration(config)


def with_thumbnail(height: int, width: int) -> int:
    """InternVL cuts an image into tiles of 8 x 8. If there are several, it adds a thumbnail."""
    count = (height // 8) * (width // 8)
    return count + (count > 1)


def thumbnailed_image(height: int, width: int) -> list[int]:
    return [START, *[IMAGE] * (4 * with_thumbnail(height, width)), END]


def thumbnailed_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(
            sum(with_thumbnail(*s) for s in sizes), 3, 8, 8, generator=generator
        )
    }


def anyres_image(height: int, width: int) -> list[int]:
    """Every size used here is a pinpoint, so nothing is padded."""
    return [IMAGE] * (4 + (height // 4) * (width // 4 + 1))


def anyres_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    most = max(1 + (h // 8) * (w // 8) for h, w in sizes)
    pixels = torch.randn(len(sizes), most, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([list(s) for s in sizes])}


def idefics2() -> nn.Module:
    perceiver = {
        "hidden_size": WIDTH,
        "resampler_n_latents": 3,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 8,
        "num_key_value_heads": 1,
    }
    config = hf.Idefics2Config(
        vision_config=dict(SQUARE_TOWER),
        perceiver_config=perceiver,
        text_config=text("mistral"),
        image_token_id=IMAGE,
    )
    return hf.Idefics2ForConditionalGeneration(config)


def idefics3(name: str = "Idefics3") -> nn.Module:
    vision = {**SQUARE_TOWER, "patch_size": 2}
    kind = getattr(hf, f"{name}Config")
    config = kind(
        vision_config=vision,
        text_config=text("llama"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def smolvlm() -> nn.Module:
    return idefics3("SmolVLM")


def three(height: int, width: int) -> list[int]:
    return [START, *[IMAGE] * 3, END]


def tile_count(height: int, width: int) -> int:
    return height * width // 64


def tiled(height: int, width: int) -> list[int]:
    return [START, *[IMAGE] * (3 * tile_count(height, width)), END]


def tiled_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(
            sum(tile_count(*s) for s in sizes), 3, 8, 8, generator=generator
        )
    }


def idefics_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """(samples, tiles, channels, height, width). A tile of zeros is padding. The model flattens the
    first two dimensions."""
    pixels = torch.randn(1, len(sizes) + 1, 3, 8, 8, generator=generator)
    pixels[:, -1] = 0
    mask = torch.ones(1, len(sizes) + 1, 8, 8, dtype=torch.long)
    mask[:, 0, :, 4:] = 0  # half a tile may be padding too
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def aria() -> nn.Module:
    experts = {
        "moe_num_experts": 4,
        "moe_topk": 2,
        "moe_num_shared_experts": 1,
        "intermediate_size": 16,
    }
    config = hf.AriaConfig(
        vision_config={"model_type": "idefics3_vision", **SQUARE_TOWER},
        text_config=hf.AriaTextConfig(**text_config(**experts)),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={4: 3},
    )
    return hf.AriaForConditionalGeneration(config)
