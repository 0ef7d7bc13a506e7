"""Tiny random vision-language models, one per family, and batches for them; for every transformers
version."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .more import MORE
from .row import DEPTH as DEPTH
from .row import (
    END,
    IMAGE,
    PAD,
    START,
    VIDEO,
    WIDTH,
    WORDS,
    Tiny,
    bracketed,
    grid_frames,
    grid_image,
    grid_pixels,
    square_image,
    square_pixels,
    text_config,
    token_types,
)


def clip(kind: type) -> Any:
    return kind(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )


PINPOINTS = [[8, 8], [8, 16], [16, 8]]
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
}
QWEN_VISION |= {"spatial_merge_size": 2}


def llava() -> nn.Module:
    text = hf.LlamaConfig(**text_config())
    config = hf.LlavaConfig(
        vision_config=clip(hf.CLIPVisionConfig), text_config=text, image_token_index=IMAGE
    )
    return hf.LlavaForConditionalGeneration(config)


def llava_next() -> nn.Module:
    config = hf.LlavaNextConfig(
        vision_config=clip(hf.CLIPVisionConfig),
        text_config=hf.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def llava_onevision() -> nn.Module:
    config = hf.LlavaOnevisionConfig(
        vision_config=clip(hf.SiglipVisionConfig),
        text_config=hf.Qwen2Config(**text_config()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    vision = {**QWEN_VISION, "embed_dim": 24, "hidden_size": WIDTH, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        vision_config=vision, text_config=text_config(rope_scaling=MROPE), **QWEN_TOKENS
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    vision = {**QWEN_VISION, "hidden_size": 24, "out_hidden_size": WIDTH, "intermediate_size": 32}
    vision |= {"window_size": 8, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text_config(rope_scaling=MROPE), **QWEN_TOKENS
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


QWEN3_VISION = {**QWEN_VISION, "hidden_size": 24, "out_hidden_size": WIDTH, "intermediate_size": 32}
QWEN3_VISION |= {"num_position_embeddings": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_ATTENTION = {
    "head_dim": 16,
    "partial_rotary_factor": 1.0,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
LINEAR_ATTENTION |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
LINEAR_ATTENTION |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}


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


def vipllava() -> nn.Module:
    config = hf.VipLlavaConfig(
        vision_config=clip(hf.CLIPVisionConfig),
        text_config=hf.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -1],
    )
    return hf.VipLlavaForConditionalGeneration(config)


def llava_next_video() -> nn.Module:
    config = hf.LlavaNextVideoConfig(
        vision_config=clip(hf.CLIPVisionConfig),
        text_config=hf.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return hf.LlavaNextVideoForConditionalGeneration(config)


def video_llava() -> nn.Module:
    config = hf.VideoLlavaConfig(
        vision_config=clip(hf.CLIPVisionConfig),
        text_config=hf.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return hf.VideoLlavaForConditionalGeneration(config)


def video_llama_3() -> nn.Module:
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = hf.VideoLlama3Config(
        vision_config={**vision, "patch_size": 2},
        text_config=hf.Qwen2Config(**text_config()),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return hf.VideoLlama3ForConditionalGeneration(config)


def internvl() -> nn.Module:
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = hf.InternVLConfig(
        vision_config={**vision, "image_size": [8, 8], "patch_size": [2, 2]},
        text_config=hf.Qwen2Config(**text_config()),
        image_token_id=IMAGE,
    )
    return hf.InternVLForConditionalGeneration(config)


def gemma3() -> nn.Module:
    text = text_config(
        head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
    )
    config = hf.Gemma3Config(
        vision_config={**clip(hf.SiglipVisionConfig).to_dict(), "patch_size": 2},
        text_config=hf.Gemma3TextConfig(**text),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = hf.PaliGemmaConfig(
        vision_config=clip(hf.SiglipVisionConfig).to_dict(),
        text_config=hf.GemmaConfig(**text_config(head_dim=16)).to_dict(),
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def mistral3() -> nn.Module:
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**vision, image_size=32, patch_size=2),
        text_config=hf.MistralConfig(**text_config(head_dim=16)),
        image_token_index=IMAGE,
    )
    return hf.Mistral3ForConditionalGeneration(config)


@dataclass
class Batch:
    """A forward's arguments, where its visual tokens are, and how many tokens each image has."""

    inputs: dict[str, torch.Tensor]
    visual: torch.Tensor
    lengths: list[int] = field(default_factory=list)


# One entry of a sample: ("text", n), ("image", height, width) or ("video", frames, height, width).
Sample = list[tuple[Any, ...]]
PLAIN: list[Sample] = [
    [("text", 3), ("image", 8, 8), ("text", 5)],
    [("text", 2), ("image", 8, 16), ("text", 3), ("image", 16, 8), ("text", 6)],
]
VIDEOS: list[Sample] = [
    [("text", 3), ("video", 4, 8, 8), ("text", 5)],
    [("text", 2), ("image", 8, 16), ("text", 3), ("video", 4, 8, 16), ("text", 6)],
]


def batch(family: str, samples: list[Sample] = PLAIN, side: str = "right", seed: int = 0) -> Batch:
    """Samples padded on `side`; the labels are the words."""
    tiny = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    rows, labels, lengths = [], [], []
    sizes: dict[str, list[Any]] = {"image": [], "video": []}
    for sample in samples:
        ids: list[int] = [1]
        for kind, *size in sample:
            if kind == "text":
                ids += torch.randint(3, WORDS, (size[0],), generator=generator).tolist()
                continue
            written = tiny.image(*size) if kind == "image" else tiny.video(*size)
            ids += written
            lengths.append(sum(i in (IMAGE, VIDEO) for i in written))
            sizes[kind].append(size)
        rows.append(ids)
        labels.append([-100 if i >= WORDS or i == 1 else i for i in ids])
    width = max(map(len, rows))

    def pad(lists: list[list[int]], value: int) -> torch.Tensor:
        filled = [
            [*r, *[value] * (width - len(r))]
            if side == "right"
            else [*[value] * (width - len(r)), *r]
            for r in lists
        ]
        return torch.tensor(filled)

    input_ids = pad(rows, PAD)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": pad([[1] * len(r) for r in rows], 0),
        "labels": pad(labels, -100),
    }
    if sizes["image"]:
        inputs |= tiny.pixels(sizes["image"], generator)
    if sizes["video"]:
        inputs |= tiny.frames(sizes["video"], generator)
    inputs |= tiny.extra(input_ids)
    return Batch(inputs, (input_ids == IMAGE) | (input_ids == VIDEO), lengths)


def video_llava_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values_images": torch.randn(len(sizes), 3, 8, 8, generator=generator)}


def square_frames(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    frames = {frames for frames, *_ in sizes}
    assert len(frames) == 1, "videos of one batch have the same number of frames"
    return {
        "pixel_values_videos": torch.randn(len(sizes), frames.pop(), 3, 8, 8, generator=generator)
    }


def tiles(height: int, width: int) -> int:
    """InternVL cuts an image into tiles of 8 x 8 and adds a thumbnail if there are several."""
    count = (height // 8) * (width // 8)
    return count + (count > 1)


def tiled_image(height: int, width: int) -> list[int]:
    return [START, *[IMAGE] * (4 * tiles(height, width)), END]


def tiled_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(sum(tiles(*s) for s in sizes), 3, 8, 8, generator=generator)
    }


def anyres_image(height: int, width: int) -> list[int]:
    return [IMAGE] * (
        4 + (height // 4) * (width // 4 + 1)
    )  # every size here is a pinpoint, so nothing is padded


def anyres_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    most = max(1 + (h // 8) * (w // 8) for h, w in sizes)
    pixels = torch.randn(len(sizes), most, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([list(s) for s in sizes])}


def broken_image(height: int, width: int) -> list[int]:
    """Pixtral: each row of the image ends with a break token, the last one with an end token;
    neither is visual."""
    lines, columns = height // 4, width // 4
    ids = [*[IMAGE] * columns, START] * lines
    return [*ids[:-1], END]


def padded_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    height, width = (max(s[i] for s in sizes) for i in (0, 1))
    pixels = torch.randn(len(sizes), 3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([list(s) for s in sizes])}


def grid_video(frames: int, height: int, width: int) -> list[int]:
    return [START, *[VIDEO] * (frames // 2 * height * width // 16), END]


def stamped_video(frames: int, height: int, width: int) -> list[int]:
    """From Qwen3-VL on every pair of frames stands alone, after its time in words."""
    return [5, *grid_video(2, height, width)] * (frames // 2)


def merged_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """VideoLLaMA3: images are not merged, so that a token is a patch."""
    grid = torch.tensor([[1, h // 4, w // 4] for h, w in sizes])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 2, generator=generator)
    return {
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "image_merge_sizes": torch.ones(len(sizes)).long(),
    }


def merged_frames(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """VideoLLaMA3: 2 x 2 patches of a video's frame make a token."""
    grid = torch.tensor([[f, h // 2, w // 2] for f, h, w in sizes])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 2, generator=generator)
    sizes_ = torch.full((len(sizes),), 2)
    return {"pixel_values_videos": pixels, "video_grid_thw": grid, "video_merge_sizes": sizes_}


def merged_video(frames: int, height: int, width: int) -> list[int]:
    return [5, *[VIDEO] * (height * width // 16)] * frames


def image_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gemma3: images attend to themselves in both directions."""
    return {"token_type_ids": (ids == IMAGE).long()}


def prefix_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """PaliGemma: 1 for what is learnt, here all after the last image."""
    images_to_come = (ids == IMAGE).flip(-1).cumsum(-1).flip(-1)
    return {"token_type_ids": (images_to_come == 0).long()}


ANYRES = {"image": anyres_image, "pixels": anyres_pixels, "frames": square_frames}
QWEN = {
    "image": grid_image,
    "pixels": grid_pixels,
    "video": grid_video,
    "frames": grid_frames,
    "extra": token_types,
    "projector": "model.visual.merger",
}
QWEN3 = {**QWEN, "video": stamped_video}
ALL = {  # by config.model_type
    "llava": Tiny(llava, square_image, square_pixels),
    "llava_next": Tiny(llava_next, anyres_image, anyres_pixels),
    "llava_next_video": Tiny(llava_next_video, video=lambda f, h, w: [VIDEO] * f, **ANYRES),
    "llava_onevision": Tiny(llava_onevision, video=lambda f, h, w: [VIDEO] * (f + 1), **ANYRES),
    "vipllava": Tiny(vipllava, square_image, square_pixels),
    "qwen2_vl": Tiny(qwen2_vl, **QWEN),
    "qwen2_5_vl": Tiny(qwen2_5_vl, **QWEN),
    "qwen3_vl": Tiny(qwen3_vl, **QWEN3),
    "qwen3_vl_moe": Tiny(qwen3_vl_moe, **QWEN3),
    "qwen3_5": Tiny(qwen3_5, **QWEN3),
    "qwen3_5_moe": Tiny(qwen3_5_moe, **QWEN3),
    "internvl": Tiny(internvl, tiled_image, tiled_pixels),
    "gemma3": Tiny(gemma3, bracketed, square_pixels, extra=image_types),
    "paligemma": Tiny(paligemma, square_image, square_pixels, extra=prefix_types),
    "mistral3": Tiny(mistral3, broken_image, padded_pixels),
    "video_llava": Tiny(
        video_llava,
        square_image,
        video_llava_pixels,
        video=lambda f, h, w: [VIDEO] * (5 * f),  # the class token too
        frames=square_frames,
    ),
    "video_llama_3": Tiny(
        video_llama_3,
        grid_image,
        merged_pixels,
        video=merged_video,
        frames=merged_frames,
        projector="model.projector",
    ),
    **MORE,
}
# those that the installed transformers has
FAMILIES = {name: tiny for name, tiny in ALL.items() if name in CONFIG_MAPPING_NAMES}


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in float32, in training mode, with weights large enough that layers differ."""
    torch.manual_seed(seed)
    model = FAMILIES[family].make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.train()
