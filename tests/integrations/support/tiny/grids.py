"""Tiny models that take an image in its own size: a visual token stands for some patches of its
grid."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as hf
from torch import nn

from .family import DEPTH, END, IMAGE, SQUARE_TOWER, START, TOWER, VIDEO, WIDTH, text, text_config


def grid_image(height: int, width: int) -> list[int]:
    return [START, *[IMAGE] * (height * width // 16), END]


def grid_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[1, h // 2, w // 2] for h, w in sizes])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 2 * 2, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def grid_frames(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[f // 2, h // 2, w // 2] for f, h, w in sizes])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 2 * 2, generator=generator)
    return {"pixel_values_videos": pixels, "video_grid_thw": grid}


def token_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments that the processors of Qwen add in transformers 5 and later."""
    forward = hf.Qwen2VLForConditionalGeneration.forward
    if "mm_token_type_ids" not in inspect.signature(forward).parameters:
        return {}
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


MROPE = {
    "rope_type": "default",
    "type": "default",
    "mrope_section": [2, 3, 3],
    "rope_theta": 10000.0,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 2,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}


def qwen2_vl() -> nn.Module:
    vision = {**QWEN_VISION, "embed_dim": 24, "hidden_size": WIDTH, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        vision_config=vision, text_config=text_config(rope_scaling=MROPE), **QWEN_TOKENS
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    vision = {
        **QWEN_VISION,
        "hidden_size": 24,
        "out_hidden_size": WIDTH,
        "intermediate_size": 32,
        "window_size": 8,
        "fullatt_block_indexes": [1],
    }
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text_config(rope_scaling=MROPE), **QWEN_TOKENS
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


QWEN3_VISION = {
    **QWEN_VISION,
    "hidden_size": 24,
    "out_hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_position_embeddings": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_ATTENTION = {
    "head_dim": 16,
    "partial_rotary_factor": 1.0,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def qwen3_vl() -> nn.Module:
    vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
    text = text_config(rope_scaling=MROPE, head_dim=16)
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_TOKENS)
    )


def qwen3_vl_moe() -> nn.Module:
    vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
    text = text_config(rope_scaling=MROPE, head_dim=16, **EXPERTS)
    config = hf.Qwen3VLMoeConfig(vision_config=vision, text_config=text, **QWEN_TOKENS)
    return hf.Qwen3VLMoeForConditionalGeneration(config)


def qwen3_5() -> nn.Module:
    text = text_config(rope_parameters=MROPE, **LINEAR_ATTENTION)
    config = hf.Qwen3_5Config(vision_config=QWEN3_VISION, text_config=text, **QWEN_TOKENS)
    return hf.Qwen3_5ForConditionalGeneration(config)


def qwen3_5_moe() -> nn.Module:
    text = text_config(
        rope_parameters=MROPE, shared_expert_intermediate_size=16, **LINEAR_ATTENTION, **EXPERTS
    )
    config = hf.Qwen3_5MoeConfig(vision_config=QWEN3_VISION, text_config=text, **QWEN_TOKENS)
    return hf.Qwen3_5MoeForConditionalGeneration(config)


def grid_video(frames: int, height: int, width: int) -> list[int]:
    return [START, *[VIDEO] * (frames // 2 * height * width // 16), END]


def stamped_video(frames: int, height: int, width: int) -> list[int]:
    """From Qwen3-VL on, every pair of frames is separate and follows its time in words."""
    return [5, *grid_video(2, height, width)] * (frames // 2)


def video_llama_3() -> nn.Module:
    config = hf.VideoLlama3Config(
        vision_config={**TOWER, "patch_size": 2},
        text_config=hf.Qwen2Config(**text_config()),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return hf.VideoLlama3ForConditionalGeneration(config)


def merged_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """VideoLLaMA3: images are not merged, so each patch is a token."""
    grid = torch.tensor([[1, h // 4, w // 4] for h, w in sizes])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 2, generator=generator)
    return {
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "image_merge_sizes": torch.ones(len(sizes)).long(),
    }


def merged_frames(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """VideoLLaMA3: 2 x 2 patches of a frame of a video make one token."""
    grid = torch.tensor([[f, h // 2, w // 2] for f, h, w in sizes])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 2, generator=generator)
    sizes_ = torch.full((len(sizes),), 2)
    return {"pixel_values_videos": pixels, "video_grid_thw": grid, "video_merge_sizes": sizes_}


def merged_video(frames: int, height: int, width: int) -> list[int]:
    return [5, *[VIDEO] * (height * width // 16)] * frames


# The ids before and after a video of GLM.
VIDEO_START, VIDEO_END = 58, 59


def glm4v(name: str = "Glm4v", sections: tuple[int, ...] = (2, 3, 3), **more: Any) -> nn.Module:
    vision = {
        "depth": 2,
        "hidden_size": 24,
        "num_heads": 2,
        "image_size": 16,
        "patch_size": 2,
        "intermediate_size": 32,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": WIDTH,
    }
    rope = {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 10000.0}
    config = getattr(hf, f"{name}Config")(
        vision_config=vision,
        text_config=text_config(rope_parameters=rope, rope_scaling=rope, **more),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def glm4v_moe() -> nn.Module:
    experts = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    return glm4v("Glm4vMoe", (1, 1, 2), **experts)


def glm_video(frames: int, height: int, width: int) -> list[int]:
    """A pair of frames is written as an image, with image tokens."""
    return [VIDEO_START, *[*grid_image(height, width), 7] * (frames // 2), VIDEO_END]


def glm_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that the processor adds in transformers 5 and later: 1 for a token of an image,
    2 for one of a video."""
    inside = ((ids == VIDEO_START).int() - (ids == VIDEO_END).int()).cumsum(-1)
    return {name: (ids == IMAGE).int() * (1 + inside) for name in token_types(ids)}


# GLM-4V does not take videos beside images.
CLIPS = [
    [("text", 3), ("video", 4, 8, 8), ("text", 5)],
    [("text", 2), ("video", 4, 8, 16), ("text", 3), ("video", 2, 16, 8), ("text", 6)],
]


def mistral3() -> nn.Module:
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**TOWER, image_size=32, patch_size=2),
        text_config=hf.MistralConfig(**text_config(head_dim=16)),
        image_token_index=IMAGE,
    )
    return hf.Mistral3ForConditionalGeneration(config)


def broken_image(height: int, width: int) -> list[int]:
    """Pixtral: each row of the image ends with a break token and the last row with an end token.
    Neither is visual."""
    lines, columns = height // 4, width // 4
    ids = [*[IMAGE] * columns, START] * lines
    return [*ids[:-1], END]


def padded_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    height, width = (max(s[i] for s in sizes) for i in (0, 1))
    pixels = torch.randn(len(sizes), 3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([list(s) for s in sizes])}


def lfm2_vl() -> nn.Module:
    vision = {
        **SQUARE_TOWER,
        "model_type": "siglip2_vision_model",
        "num_patches": 16,
        "patch_size": 2,
    }
    # Layers 2 and 4 have attention, the others convolutions.
    inner = text(
        "lfm2", full_attn_idxs=[1, 3], layer_types=["conv", "full_attention"] * (DEPTH // 2)
    )
    config = hf.Lfm2VlConfig(
        vision_config=vision,
        text_config=inner,
        image_token_id=IMAGE,
        projector_hidden_size=28,
        downsample_factor=2,
    )
    return hf.Lfm2VlForConditionalGeneration(config)


def ragged_image(height: int, width: int) -> list[int]:
    return [IMAGE] * (height * width // 16)


def ragged_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """LFM2-VL: patches (images, most, 3 · 2 · 2), where each image has its own number of
    patches."""
    shapes = torch.tensor([[h // 2, w // 2] for h, w in sizes])
    counts = shapes.prod(-1)
    mask = (torch.arange(int(counts.max())) < counts[:, None]).int()
    pixels = torch.randn(*mask.shape, 3 * 2 * 2, generator=generator)
    return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}
