"""Tiny random vision-language models, one per family, and batches for them; for every transformers version."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

WIDTH, DEPTH = 32, 4
IMAGE, VIDEO, START, END, PAD, WORDS = 60, 61, 62, 63, 0, 50


def text_config(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def clip(kind: type) -> Any:
    return kind(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )


PINPOINTS = [[8, 8], [8, 16], [16, 8]]
MROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": 2, "temporal_patch_size": 2}
QWEN_VISION |= {"spatial_merge_size": 2}


def llava() -> nn.Module:
    text = LlamaConfig(**text_config())
    config = LlavaConfig(vision_config=clip(CLIPVisionConfig), text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def llava_next() -> nn.Module:
    config = LlavaNextConfig(
        vision_config=clip(CLIPVisionConfig),
        text_config=LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextForConditionalGeneration(config)


def llava_onevision() -> nn.Module:
    config = LlavaOnevisionConfig(
        vision_config=clip(SiglipVisionConfig),
        text_config=Qwen2Config(**text_config()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
    )
    return LlavaOnevisionForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    vision = {**QWEN_VISION, "embed_dim": 24, "hidden_size": WIDTH, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=text_config(rope_scaling=MROPE), **QWEN_TOKENS)
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    vision = {**QWEN_VISION, "hidden_size": 24, "out_hidden_size": WIDTH, "intermediate_size": 32}
    vision |= {"window_size": 8, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text_config(rope_scaling=MROPE), **QWEN_TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> nn.Module:
    vision = {**QWEN_VISION, "hidden_size": 24, "out_hidden_size": WIDTH, "intermediate_size": 32}
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    text = text_config(rope_scaling=MROPE, head_dim=16)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_TOKENS))


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
            [*r, *[value] * (width - len(r))] if side == "right" else [*[value] * (width - len(r)), *r] for r in lists
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


def square_image(height: int, width: int) -> list[int]:
    return [IMAGE] * 4  # whatever the size: it is resized to 8 x 8


def square_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(sizes), 3, 8, 8, generator=generator)}


def anyres_image(height: int, width: int) -> list[int]:
    return [IMAGE] * (4 + (height // 4) * (width // 4 + 1))  # every size here is a pinpoint, so nothing is padded


def anyres_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    most = max(1 + (h // 8) * (w // 8) for h, w in sizes)
    pixels = torch.randn(len(sizes), most, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([list(s) for s in sizes])}


def grid_image(height: int, width: int) -> list[int]:
    return [START, *[IMAGE] * (height * width // 16), END]


def grid_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[1, h // 2, w // 2] for h, w in sizes])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 2 * 2, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def token_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the processors of Qwen add from transformers 5 on."""
    if "mm_token_type_ids" not in inspect.signature(Qwen2VLForConditionalGeneration.forward).parameters:
        return {}
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def nothing(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {}


def none(*_: Any) -> Any:
    raise NotImplementedError("the family has no videos")


@dataclass
class Tiny:
    """One family: how its model is made and its batches are written.

    Attributes:
        image: (height, width) → the ids that such an image puts into a sample; those equal to IMAGE are visual tokens.
        pixels: (sizes of the batch's images, generator) → the forward's arguments for them.
        video, frames: the same for videos, of (frames, height, width); VIDEO (or IMAGE) ids are visual tokens.
        extra: input_ids (B, T) → further arguments, for batches without images too.
        text, projector: paths, written down here so that the tests do not rely on the library's search.
    """

    make: Callable[[], nn.Module]
    image: Callable[[int, int], list[int]]
    pixels: Callable[..., dict[str, torch.Tensor]]
    video: Callable[[int, int, int], list[int]] = none
    frames: Callable[..., dict[str, torch.Tensor]] = none
    extra: Callable[[torch.Tensor], dict[str, torch.Tensor]] = nothing
    text: str = "model.language_model"
    projector: str = "model.multi_modal_projector"


QWEN = {"image": grid_image, "pixels": grid_pixels, "extra": token_types, "projector": "model.visual.merger"}
FAMILIES = {  # by config.model_type
    "llava": Tiny(llava, square_image, square_pixels),
    "llava_next": Tiny(llava_next, anyres_image, anyres_pixels),
    "llava_onevision": Tiny(llava_onevision, anyres_image, anyres_pixels),
    "qwen2_vl": Tiny(qwen2_vl, **QWEN),
    "qwen2_5_vl": Tiny(qwen2_5_vl, **QWEN),
    "qwen3_vl": Tiny(qwen3_vl, **QWEN),
}


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in float32, in training mode, with weights large enough that layers differ."""
    torch.manual_seed(seed)
    model = FAMILIES[family].make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.train()
