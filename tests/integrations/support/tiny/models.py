"""The table of tiny random vision-language models, one per family, and their batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from packaging.version import Version
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from . import codes, grids, squares, tiles
from .family import DEPTH as DEPTH
from .family import IMAGE, PAD, VIDEO, WORDS, Tiny
from .family import WIDTH as WIDTH
from .family import text_config as text_config

OLD = hf.__version__.startswith("4.")
# 5.17 gives no error. The versions between were not tried.
SILENT = Version(hf.__version__) < Version("5.24")


@dataclass
class Batch:
    """The arguments of a forward, the mask of its visual tokens, and the number of tokens of each
    image."""

    inputs: dict[str, torch.Tensor]
    visual: torch.Tensor
    lengths: list[int] = field(default_factory=list)


# An entry of a sample: ("text", n), ("image", height, width) or ("video", frames, height, width).
Sample = list[tuple[Any, ...]]
PLAIN: list[Sample] = [
    [("text", 3), ("image", 8, 8), ("text", 5)],
    [("text", 2), ("image", 8, 16), ("text", 3), ("image", 16, 8), ("text", 6)],
]
VIDEOS: list[Sample] = [
    [("text", 3), ("video", 4, 8, 8), ("text", 5)],
    [("text", 2), ("image", 8, 16), ("text", 3), ("video", 4, 8, 16), ("text", 6)],
]


ANYRES = {
    "image": tiles.anyres_image,
    "pixels": tiles.anyres_pixels,
    "frames": squares.square_frames,
}
QWEN = {
    "image": grids.grid_image,
    "pixels": grids.grid_pixels,
    "video": grids.grid_video,
    "frames": grids.grid_frames,
    "extra": grids.token_types,
    "projector": "model.visual.merger",
}
QWEN3 = {**QWEN, "video": grids.stamped_video}
GLM = {
    "image": grids.grid_image,
    "pixels": grids.grid_pixels,
    "video": grids.glm_video,
    "frames": grids.grid_frames,
    "extra": grids.glm_types,
    "projector": "model.visual.merger",
    "clips": grids.CLIPS,
}
IDEFICS = {"pixels": tiles.idefics_pixels, "text": "model.text_model"}
SHUFFLED = {"projector": "model.connector.modality_projection"}

# All families by config.model_type, whichever transformers is installed.
ALL = {
    "llava": Tiny(squares.llava, squares.square_image, squares.square_pixels),
    "llava_next": Tiny(tiles.llava_next, tiles.anyres_image, tiles.anyres_pixels),
    "llava_next_video": Tiny(tiles.llava_next_video, video=lambda f, h, w: [VIDEO] * f, **ANYRES),
    "llava_onevision": Tiny(
        tiles.llava_onevision, video=lambda f, h, w: [VIDEO] * (f + 1), **ANYRES
    ),
    "vipllava": Tiny(squares.vipllava, squares.square_image, squares.square_pixels),
    "qwen2_vl": Tiny(grids.qwen2_vl, **QWEN),
    "qwen2_5_vl": Tiny(grids.qwen2_5_vl, **QWEN),
    "qwen3_vl": Tiny(grids.qwen3_vl, **QWEN3),
    "qwen3_vl_moe": Tiny(grids.qwen3_vl_moe, **QWEN3),
    "qwen3_5": Tiny(grids.qwen3_5, **QWEN3),
    "qwen3_5_moe": Tiny(grids.qwen3_5_moe, **QWEN3),
    "internvl": Tiny(tiles.internvl, tiles.thumbnailed_image, tiles.thumbnailed_pixels),
    "gemma3": Tiny(
        squares.gemma3, squares.bracketed, squares.square_pixels, extra=squares.image_types
    ),
    "paligemma": Tiny(
        squares.paligemma, squares.square_image, squares.square_pixels, extra=squares.prefix_types
    ),
    "mistral3": Tiny(grids.mistral3, grids.broken_image, grids.padded_pixels),
    "video_llava": Tiny(
        squares.video_llava,
        squares.square_image,
        squares.video_llava_pixels,
        video=lambda f, h, w: [VIDEO] * (5 * f),  # with the class token
        frames=squares.square_frames,
    ),
    "video_llama_3": Tiny(
        grids.video_llama_3,
        grids.grid_image,
        grids.merged_pixels,
        video=grids.merged_video,
        frames=grids.merged_frames,
        projector="model.projector",
    ),
    "idefics2": Tiny(tiles.idefics2, tiles.three, **IDEFICS, projector=None, silent=SILENT),
    "idefics3": Tiny(tiles.idefics3, squares.bracketed, **IDEFICS, **SHUFFLED, silent=SILENT),
    "smolvlm": Tiny(tiles.smolvlm, squares.bracketed, **IDEFICS, **SHUFFLED),
    "glm4v": Tiny(grids.glm4v, **GLM),
    "glm4v_moe": Tiny(grids.glm4v_moe, **GLM),
    "glm46v": Tiny(lambda: grids.glm4v("Glm46V"), **GLM),
    "llama4": Tiny(
        squares.llama4,
        squares.bracketed,
        squares.square_pixels,
        text="language_model.model",
        projector="multi_modal_projector",
        lost=squares.LOST,
    ),
    "cohere2_vision": Tiny(
        squares.cohere2_vision,
        squares.bracketed,
        squares.square_pixels,
        projector="model.multi_modal_projector.linear_1",
        made_by="model.multi_modal_projector",
    ),
    "aya_vision": Tiny(
        squares.aya_vision,
        squares.bracketed,
        squares.square_pixels,
        projector="model.multi_modal_projector.linear_1",
        made_by="model.multi_modal_projector",
    ),
    "ovis2": Tiny(
        squares.ovis2,
        squares.bracketed,
        squares.square_pixels,
        projector="model.vision_tower.head_linear",
        made_by="model.visual_embeddings_table",
    ),
    "aria": Tiny(tiles.aria, tiles.tiled, tiles.tiled_pixels, projector=None),
    "lfm2_vl": Tiny(grids.lfm2_vl, grids.ragged_image, grids.ragged_pixels, projector=None),
    "got_ocr2": Tiny(squares.got_ocr2, squares.bracketed, squares.large_pixels, projector=None),
    "janus": Tiny(
        squares.janus, squares.bracketed, squares.square_pixels, projector="model.aligner"
    ),
    "deepseek_vl": Tiny(
        squares.deepseek_vl, squares.square_image, squares.square_pixels, projector="model.aligner"
    ),
    "deepseek_vl_hybrid": Tiny(
        squares.deepseek_vl_hybrid,
        squares.square_image,
        squares.two_pixels,
        projector="model.aligner",
        silent=SILENT,
    ),
    "emu3": Tiny(
        codes.emu3,
        codes.lined_image,
        codes.lined_pixels,
        text="model.text_model",
        projector=None,
        silent=OLD,
    ),
    "chameleon": Tiny(
        codes.chameleon, squares.bracketed, squares.square_pixels, text="model", projector=None
    ),
    "gemma3n": Tiny(
        squares.gemma3n,
        squares.bracketed,
        squares.square_pixels,
        projector=None,
        hidden=squares.active,
    ),
}

# The families of the installed transformers.
FAMILIES = {name: tiny for name, tiny in ALL.items() if name in CONFIG_MAPPING_NAMES}


def batch(family: str, samples: list[Sample] = PLAIN, side: str = "right", seed: int = 0) -> Batch:
    """Samples, padded on `side`. The labels are the words."""
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


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in float32, in training mode, with weights large enough for its layers to differ."""
    torch.manual_seed(seed)
    model = FAMILIES[family].make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.train()
