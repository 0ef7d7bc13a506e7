"""Tiny models that resize each image to a square, so it has a fixed number of visual tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama4 import modeling_llama4

from .family import DEPTH, END, IMAGE, SQUARE_TOWER, START, VIDEO, WIDTH, text, text_config, tower


def square_image(height: int, width: int) -> list[int]:
    """The size does not matter, because the image is resized to 8 x 8."""
    return [IMAGE] * 4


def square_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(sizes), 3, 8, 8, generator=generator)}


def bracketed(height: int, width: int) -> list[int]:
    return [START, *[IMAGE] * 4, END]


def video_llava_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values_images": torch.randn(len(sizes), 3, 8, 8, generator=generator)}


def square_frames(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    frames = {frames for frames, *_ in sizes}
    assert len(frames) == 1, "videos of one batch have the same number of frames"
    return {
        "pixel_values_videos": torch.randn(len(sizes), frames.pop(), 3, 8, 8, generator=generator)
    }


def image_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gemma3: the tokens of an image attend to each other in both directions."""
    return {"token_type_ids": (ids == IMAGE).long()}


def prefix_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """PaliGemma: 1 for text that is trained, here everything after the last image."""
    images_to_come = (ids == IMAGE).flip(-1).cumsum(-1).flip(-1)
    return {"token_type_ids": (images_to_come == 0).long()}


def large_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(sizes), 3, 16, 16, generator=generator)}


def two_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    large = large_pixels(sizes, generator)["pixel_values"]
    return square_pixels(sizes, generator) | {"high_res_pixel_values": large}


def llava() -> nn.Module:
    text = hf.LlamaConfig(**text_config())
    config = hf.LlavaConfig(
        vision_config=tower(hf.CLIPVisionConfig), text_config=text, image_token_index=IMAGE
    )
    return hf.LlavaForConditionalGeneration(config)


def vipllava() -> nn.Module:
    config = hf.VipLlavaConfig(
        vision_config=tower(hf.CLIPVisionConfig),
        text_config=hf.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -1],
    )
    return hf.VipLlavaForConditionalGeneration(config)


def video_llava() -> nn.Module:
    config = hf.VideoLlavaConfig(
        vision_config=tower(hf.CLIPVisionConfig),
        text_config=hf.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return hf.VideoLlavaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    text = text_config(
        head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
    )
    config = hf.Gemma3Config(
        vision_config={**tower(hf.SiglipVisionConfig).to_dict(), "patch_size": 2},
        text_config=hf.Gemma3TextConfig(**text),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = hf.PaliGemmaConfig(
        vision_config=tower(hf.SiglipVisionConfig).to_dict(),
        text_config=hf.GemmaConfig(**text_config(head_dim=16)).to_dict(),
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


SIGLIP = {"model_type": "siglip_vision_model", **SQUARE_TOWER}
SAM = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 2,
    "window_size": 2,
    "hidden_size": 24,
    "output_channels": 8,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
}


def llama4() -> nn.Module:
    vision = {
        **SQUARE_TOWER,
        "patch_size": 2,
        "intermediate_size": 96,
        "pixel_shuffle_ratio": 0.5,
        "vision_output_dim": 20,
        "projector_input_dim": 20,
        "projector_output_dim": 20,
    }
    inner = text_config(
        intermediate_size_mlp=48, head_dim=16, num_local_experts=2, attention_chunk_size=64
    )
    config = hf.Llama4Config(vision_config=vision, text_config=inner, image_token_index=IMAGE)
    output = getattr(modeling_llama4, "MoeCausalLMOutputWithPast", None)
    if output is not None and not hasattr(output, "image_outputs"):
        # 5.24 reads an attribute that this output lacks, and fails without it.
        output.image_outputs = None
    return hf.Llama4ForConditionalGeneration(config)


def cohere2_vision() -> nn.Module:
    config = hf.Cohere2VisionConfig(
        vision_config={**SIGLIP, "patch_size": 2},
        text_config=text("cohere2"),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=40,
    )
    return hf.Cohere2VisionForConditionalGeneration(config)


def aya_vision() -> nn.Module:
    vision = {**SIGLIP, "patch_size": 2}
    config = hf.AyaVisionConfig(
        vision_config=vision, text_config=text("cohere2"), image_token_index=IMAGE
    )
    return hf.AyaVisionForConditionalGeneration(config)


def ovis2() -> nn.Module:
    config = hf.Ovis2Config(
        vision_config={**SQUARE_TOWER, "vocab_size": 20, "num_visual_indicator_tokens": 2},
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END],
        vocab_size=64,
        hidden_size=WIDTH,
    )
    return hf.Ovis2ForConditionalGeneration(config)


def got_ocr2() -> nn.Module:
    config = hf.GotOcr2Config(
        vision_config=dict(SAM),
        text_config=text("qwen2"),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return hf.GotOcr2ForConditionalGeneration(config)


def janus() -> nn.Module:
    vision = {**SQUARE_TOWER, "mlp_ratio": 2, "projection_dim": WIDTH, "num_image_tokens": 4}
    codes = {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "base_channels": 32,
        "num_res_blocks": 1,
        "channel_multiplier": [1],
        "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
    }
    config = hf.JanusConfig(
        vision_config=vision, vq_config=codes, text_config=text("llama"), image_token_id=IMAGE
    )
    return hf.JanusForConditionalGeneration(config)


def deepseek_vl() -> nn.Module:
    config = hf.DeepseekVLConfig(
        vision_config=dict(SIGLIP), text_config=text("llama"), image_token_id=IMAGE
    )
    return hf.DeepseekVLForConditionalGeneration(config)


def deepseek_vl_hybrid() -> nn.Module:
    config = hf.DeepseekVLHybridConfig(
        vision_config=dict(SIGLIP),
        high_res_vision_config={"model_type": "sam_vision_model", **SAM},
        text_config=text("llama"),
        image_token_id=IMAGE,
    )
    return hf.DeepseekVLHybridForConditionalGeneration(config)


class Tower(hf.PreTrainedModel):
    """A stand-in for Gemma 3n's convolutional encoder, which comes from timm."""

    config_class = hf.Gemma3nVisionConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 4, 4)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.patches(pixel_values))


def gemma3n() -> nn.Module:
    # Like `AutoModel.register`, which in 5.17 skips the configs of transformers itself.
    hf.AutoModel._model_mapping._extra_content[hf.Gemma3nVisionConfig] = Tower
    inner = text_config(
        head_dim=16, vocab_size_per_layer_input=58, hidden_size_per_layer_input=8, laurel_rank=4
    )
    inner |= {
        "altup_num_inputs": 3,
        "altup_active_idx": 1,
        # Shared layers lose gradients under reentrant checkpointing in 5.24, and 4.57 shares them
        # only in eval mode.
        "num_kv_shared_layers": 0,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2),
    }
    audio = {
        "vocab_size": 2,
        "vocab_offset": 64,
        "hidden_size": 16,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1,
        "input_feat_size": 8,
        "sscp_conv_channel_size": (4, 4),
    }
    config = hf.Gemma3nConfig(
        text_config=hf.Gemma3nTextConfig(**inner),
        vision_config=hf.Gemma3nVisionConfig(hidden_size=24, vocab_size=6, vocab_offset=58),
        audio_config=hf.Gemma3nAudioConfig(**audio),
        image_token_id=IMAGE,
        audio_token_id=65,
        vision_soft_tokens_per_image=4,
    )
    return hf.Gemma3nForConditionalGeneration(config)


def active(states: torch.Tensor) -> torch.Tensor:
    """Gemma 3n: the states that a layer works on, from the states that it gets."""
    return states[1]


# Parameters before the last checkpointed layer of Llama 4's encoder. It passes the states by
# keyword, so reentrant checkpointing loses their gradients.
LOST = tuple(
    f"vision_model.{name}" for name in ("class", "positional", "patch", "layernorm_pre", "model.")
)
