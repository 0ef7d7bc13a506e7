"""A row of the table of tiny families: how to make a model and its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WIDTH = 32
DEPTH = 4
# The vocabulary: 0 is padding, ids below WORDS are words, and the others stand for images and
# videos.
PAD = 0
WORDS = 50
IMAGE = 60
VIDEO = 61
START = 62
END = 63

# The sizes of a vision tower.
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SQUARE_TOWER = {**TOWER, "image_size": 8, "patch_size": 4}


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


def text(model_type: str, **more: Any) -> dict[str, Any]:
    """A text config in the form of settings of a vision-language config."""
    return {"model_type": model_type, **text_config(**more)}


def tower(kind: type) -> Any:
    return kind(**SQUARE_TOWER)


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
        made_by: path of the module whose output rows are the visual tokens' embeddings, where that
            is not the projector.
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
