"""Tiny random models in a folder, with what reads text and images beside them, as on a hub: each
function writes them and returns the folder."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from pre_kernels.demo.export import processor
from pre_kernels.demo.model import build
from pre_kernels.demo.settings import Settings
from pre_kernels.demo.text import IMAGE, VOCABULARY

from .family import DEPTH, text, text_config, tower
from .grids import MROPE, QWEN_VISION

QWEN_NAMES = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen's names of roles and ends, without its default system prompt
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llava(folder: Path) -> Path:
    """A LLaVA and its processor, whose tokenizer pads and ends, as a real one's does."""
    torch.manual_seed(0)
    build(Settings(width=32, layers=DEPTH)).save_pretrained(folder)
    made = processor()
    made.tokenizer.add_special_tokens({"pad_token": "<s>", "eos_token": "<s>"})
    made.save_pretrained(folder)
    return folder


def llava_next(folder: Path) -> Path:
    """A LLaVA-NeXT, which cuts an image into tiles, and its processor."""
    plain = processor()
    plain.tokenizer.add_special_tokens({"pad_token": "<s>", "eos_token": "<s>"})
    shapes = [[8, 16], [16, 8], [16, 16]]
    config = hf.LlavaNextConfig(
        vision_config=tower(hf.CLIPVisionConfig),
        text_config=text("llama", vocab_size=VOCABULARY, max_position_embeddings=512),
        image_token_index=IMAGE,
        image_grid_pinpoints=shapes,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    hf.LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_grid_pinpoints=shapes,
    )
    hf.LlavaNextProcessor(
        image_processor=images,
        tokenizer=plain.tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=plain.chat_template,
    ).save_pretrained(folder)
    return folder


def qwen2_5_vl(folder: Path) -> Path:
    """A Qwen2.5-VL with a tokenizer of bytes and Qwen's special tokens, and an image processor."""
    tokenizer = processor().tokenizer
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer.add_special_tokens({"additional_special_tokens": [*QWEN_NAMES], **ends})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    vision = {
        **QWEN_VISION,
        "hidden_size": 24,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "window_size": 8,
        "fullatt_block_indexes": [1],
    }
    decoder = text_config(
        rope_scaling=MROPE, vocab_size=len(tokenizer), max_position_embeddings=512
    )
    tokens = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    torch.manual_seed(0)
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=decoder, **tokens)
    hf.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"patch_size": 2, "temporal_patch_size": 2, "merge_size": 2}
    hf.Qwen2VLImageProcessor(**sizes, min_pixels=16, max_pixels=144).save_pretrained(folder)
    return folder
