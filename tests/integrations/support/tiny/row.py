"""A row of the table of tiny models: what it says of a family, and what rows are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

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


def square_image(height: int, width: int) -> list[int]:
    return [IMAGE] * 4  # whatever the size: it is resized to 8 x 8


def square_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(sizes), 3, 8, 8, generator=generator)}


def bracketed(height: int, width: int) -> list[int]:
    return [START, *[IMAGE] * 4, END]


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
    """What the processors of Qwen add from transformers 5 on."""
    if (
        "mm_token_type_ids"
        not in inspect.signature(hf.Qwen2VLForConditionalGeneration.forward).parameters
    ):
        return {}
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def nothing(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {}


def none(*_: Any) -> Any:
    raise NotImplementedError("the family has no videos")


def same(states: torch.Tensor) -> torch.Tensor:
    return states


@dataclass
class Tiny:
    """One family: how its model is made and its batches are written.

    Attributes:
        image: (height, width) → the ids that such an image puts into a sample; those equal to IMAGE
            are visual tokens.
        pixels: (sizes of the batch's images, generator) → the forward's arguments for them.
        video, frames: the same for videos, of (frames, height, width); VIDEO (or IMAGE) ids are
            visual tokens.
        extra: input_ids (B, T) → further arguments, for batches without images too.
        made_by: path of the module that makes a visual token's embedding of each row of the
            projector's, if another.
        text, projector: paths, written down here so that the tests do not rely on the library's
            search; no projector where no module's input rows are the visual tokens.
        clips: samples with videos, if the family takes no videos beside images.
        hidden: what a layer is given → the states (B, T, d) that it works on.
        lost: prefixes of the parameters that get no gradient under reentrant checkpointing, with or
            without PRe.
        silent: whether the model takes fewer image tokens than features without an error.
    """

    make: Callable[[], nn.Module]
    image: Callable[[int, int], list[int]]
    pixels: Callable[..., dict[str, torch.Tensor]]
    video: Callable[[int, int, int], list[int]] = none
    frames: Callable[..., dict[str, torch.Tensor]] = none
    extra: Callable[[torch.Tensor], dict[str, torch.Tensor]] = nothing
    text: str = "model.language_model"
    projector: str | None = "model.multi_modal_projector"
    made_by: str | None = None
    clips: list[list[tuple[Any, ...]]] | None = None
    lost: tuple[str, ...] = ()
    hidden: Callable[[torch.Tensor], torch.Tensor] = same
    silent: bool = False

    @property
    def videos(self) -> bool:
        return self.video is not none
