"""Fuyu, a family of transformers that is not in the table; its images are patches."""

from __future__ import annotations

import transformers
from torch import nn

from .models import IMAGE, text_config


def fuyu() -> nn.Module:
    text = text_config(model_type="persimmon", pad_token_id=0)
    sizes = {
        name: text[name]
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    }
    config = transformers.FuyuConfig(
        **sizes, patch_size=4, image_token_id=IMAGE, text_config=text, pad_token_id=0
    )
    return transformers.FuyuForCausalLM(config).train()
