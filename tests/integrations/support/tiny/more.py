"""More of the tiny models of `models`: the families that cut images into tiles, resample, or
take no projector."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from packaging.version import Version
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama4 import modeling_llama4

from .row import (
    DEPTH,
    END,
    IMAGE,
    START,
    VIDEO,
    WIDTH,
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

VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION |= {"image_size": 8, "patch_size": 4}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
SAM = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 2,
    "window_size": 2,
}
SAM |= {"hidden_size": 24, "output_channels": 8, "global_attn_indexes": [1], "mlp_dim": 32}
VIDEO_START, VIDEO_END = 58, 59
OLD = hf.__version__.startswith("4.")
SILENT = Version(hf.__version__) < Version(
    "5.24"
)  # 5.17 is silent; what lies between was not looked at


def text(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **text_config(**more)}


def idefics2() -> nn.Module:
    perceiver = {
        "hidden_size": WIDTH,
        "resampler_n_latents": 3,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
    }
    perceiver |= {"resampler_head_dim": 8, "num_key_value_heads": 1}
    config = hf.Idefics2Config(
        vision_config=dict(VISION),
        perceiver_config=perceiver,
        text_config=text("mistral"),
        image_token_id=IMAGE,
    )
    return hf.Idefics2ForConditionalGeneration(config)


def idefics3(name: str = "Idefics3") -> nn.Module:
    vision = {**VISION, "patch_size": 2}
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


def tiles(height: int, width: int) -> int:
    return height * width // 64


def tiled(height: int, width: int) -> list[int]:
    return [START, *[IMAGE] * (3 * tiles(height, width)), END]


def tiled_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(sum(tiles(*s) for s in sizes), 3, 8, 8, generator=generator)
    }


def idefics_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """(samples, tiles, channels, height, width), where a tile of zeros pads; the model flattens the
    first two."""
    pixels = torch.randn(1, len(sizes) + 1, 3, 8, 8, generator=generator)
    pixels[:, -1] = 0
    mask = torch.ones(1, len(sizes) + 1, 8, 8, dtype=torch.long)
    mask[:, 0, :, 4:] = 0  # the right half of a tile may be padding too
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def glm4v(name: str = "Glm4v", sections: tuple[int, ...] = (2, 3, 3), **more: Any) -> nn.Module:
    vision = {
        "depth": 2,
        "hidden_size": 24,
        "num_heads": 2,
        "image_size": 16,
        "patch_size": 2,
        "intermediate_size": 32,
    }
    vision |= {"temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": WIDTH}
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
    """A frame of two is written as an image, with image tokens."""
    return [VIDEO_START, *[*grid_image(height, width), 7] * (frames // 2), VIDEO_END]


def glm_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the processor adds from transformers 5 on: 1 for an image's token, 2 for a video's."""
    inside = ((ids == VIDEO_START).int() - (ids == VIDEO_END).int()).cumsum(-1)
    return {name: (ids == IMAGE).int() * (1 + inside) for name in token_types(ids)}


def llama4() -> nn.Module:
    vision = {**VISION, "patch_size": 2, "intermediate_size": 96, "pixel_shuffle_ratio": 0.5}
    vision |= {"vision_output_dim": 20, "projector_input_dim": 20, "projector_output_dim": 20}
    inner = text_config(
        intermediate_size_mlp=48, head_dim=16, num_local_experts=2, attention_chunk_size=64
    )
    config = hf.Llama4Config(vision_config=vision, text_config=inner, image_token_index=IMAGE)
    output = getattr(modeling_llama4, "MoeCausalLMOutputWithPast", None)
    if output is not None and not hasattr(output, "image_outputs"):
        output.image_outputs = (
            None  # 5.24 reads it from an output that has none, and cannot run without this
        )
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
        vision_config={**VISION, "vocab_size": 20, "num_visual_indicator_tokens": 2},
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END],
        vocab_size=64,
        hidden_size=WIDTH,
    )
    return hf.Ovis2ForConditionalGeneration(config)


def aria() -> nn.Module:
    experts = {
        "moe_num_experts": 4,
        "moe_topk": 2,
        "moe_num_shared_experts": 1,
        "intermediate_size": 16,
    }
    config = hf.AriaConfig(
        vision_config={"model_type": "idefics3_vision", **VISION},
        text_config=hf.AriaTextConfig(**text_config(**experts)),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={4: 3},
    )
    return hf.AriaForConditionalGeneration(config)


def lfm2_vl() -> nn.Module:
    vision = {**VISION, "model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 2}
    # layers 2 and 4 attend, the others convolve
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
    """Patches (images, most, 3 · 2 · 2), their number differs."""
    shapes = torch.tensor([[h // 2, w // 2] for h, w in sizes])
    counts = shapes.prod(-1)
    mask = (torch.arange(int(counts.max())) < counts[:, None]).int()
    pixels = torch.randn(*mask.shape, 3 * 2 * 2, generator=generator)
    return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}


def got_ocr2() -> nn.Module:
    config = hf.GotOcr2Config(
        vision_config=dict(SAM),
        text_config=text("qwen2"),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return hf.GotOcr2ForConditionalGeneration(config)


def large_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(sizes), 3, 16, 16, generator=generator)}


def janus() -> nn.Module:
    vision = {**VISION, "mlp_ratio": 2, "projection_dim": WIDTH, "num_image_tokens": 4}
    codes = {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "base_channels": 32,
        "num_res_blocks": 1,
    }
    codes |= {"channel_multiplier": [1], "projection_dim": WIDTH, "image_token_embed_dim": WIDTH}
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


def two_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    large = large_pixels(sizes, generator)["pixel_values"]
    return square_pixels(sizes, generator) | {"high_res_pixel_values": large}


def chameleon() -> nn.Module:
    codes = {
        "embed_dim": 8,
        "num_embeddings": 8,
        "latent_channels": 8,
        "resolution": 8,
        "base_channels": 32,
    }
    codes |= {"channel_multiplier": [1, 1, 1], "num_res_blocks": 1}
    names = {f"IMGIMG{letter}Z": 50 + i for i, letter in enumerate("ABCDEFGH")}
    config = hf.ChameleonConfig(
        **text_config(), vq_config=codes, vocabulary_map={"<image>": IMAGE, **names}
    )
    return hf.ChameleonForConditionalGeneration(config)


class FrozenCodes(hf.Emu3ForConditionalGeneration):
    """Emu3 with its image tokenizer in eval, as it is meant; the batch norms in it would change
    with each forward."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.model.vqmodel.eval()
        return self


def emu3() -> nn.Module:
    codes = {
        "codebook_size": 8,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "num_res_blocks": 1,
    }
    codes |= {
        "channel_multiplier": [1, 1, 1],
        "attn_resolutions": [],
        "hidden_size": 32,
        "num_attention_heads": 2,
    }
    names = {f"<|visual token {i:06d}|>": 50 + i for i in range(8)} | {"<|extra_200|>": 58}
    config = hf.Emu3Config(
        vq_config=codes,
        text_config=text_config(attention_dropout=0.0),
        vocabulary_map={"<image>": IMAGE, **names},
        tie_word_embeddings=False,
    )
    return FrozenCodes(config)


def lined_image(height: int, width: int) -> list[int]:
    """A code for 4 x 4 pixels, and one for the end of each line."""
    return [START, *[IMAGE] * (height // 4 * (width // 4 + 1)), END]


def lined_pixels(sizes: list[Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    height, width = (max(s[i] for s in sizes) for i in (0, 1))
    pixels = torch.randn(len(sizes), 3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([list(s) for s in sizes])}


class Tower(hf.PreTrainedModel):
    """Stands for Gemma 3n's convolutional encoder, which is timm's."""

    config_class = hf.Gemma3nVisionConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 4, 4)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.patches(pixel_values))


def gemma3n() -> nn.Module:
    # what `AutoModel.register` does, but in 5.17, where it passes over transformers' own configs
    hf.AutoModel._model_mapping._extra_content[hf.Gemma3nVisionConfig] = Tower
    inner = text_config(
        head_dim=16, vocab_size_per_layer_input=58, hidden_size_per_layer_input=8, laurel_rank=4
    )
    # shared keys and values lose gradients under reentrant checkpointing in 5.24, and 4.57 shares
    # them in eval only
    inner |= {
        "altup_num_inputs": 3,
        "altup_active_idx": 1,
        "num_kv_shared_layers": 0,
        "sliding_window": 8,
    }
    inner |= {"layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)}
    audio = {"vocab_size": 2, "vocab_offset": 64, "hidden_size": 16, "conf_num_attention_heads": 2}
    audio |= {"conf_num_hidden_layers": 1, "input_feat_size": 8, "sscp_conv_channel_size": (4, 4)}
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
    return states[1]


CLIPS = [
    [("text", 3), ("video", 4, 8, 8), ("text", 5)],
    [("text", 2), ("video", 4, 8, 16), ("text", 3), ("video", 2, 16, 8), ("text", 6)],
]
GLM = {
    "image": grid_image,
    "pixels": grid_pixels,
    "video": glm_video,
    "frames": grid_frames,
    "extra": glm_types,
}
GLM |= {"projector": "model.visual.merger", "clips": CLIPS}
# all before the last checkpointed layer of Llama 4's encoder, which passes the states by keyword
LOST = tuple(
    f"vision_model.{name}" for name in ("class", "positional", "patch", "layernorm_pre", "model.")
)
IDEFICS = {"pixels": idefics_pixels, "text": "model.text_model"}
SHUFFLED = {"projector": "model.connector.modality_projection"}
MORE = {  # by config.model_type
    "idefics2": Tiny(idefics2, three, **IDEFICS, projector=None, silent=SILENT),
    "idefics3": Tiny(idefics3, bracketed, **IDEFICS, **SHUFFLED, silent=SILENT),
    "smolvlm": Tiny(smolvlm, bracketed, **IDEFICS, **SHUFFLED),
    "glm4v": Tiny(glm4v, **GLM),
    "glm4v_moe": Tiny(glm4v_moe, **GLM),
    "glm46v": Tiny(lambda: glm4v("Glm46V"), **GLM),
    "llama4": Tiny(
        llama4,
        bracketed,
        square_pixels,
        text="language_model.model",
        projector="multi_modal_projector",
        lost=LOST,
    ),
    "cohere2_vision": Tiny(
        cohere2_vision,
        bracketed,
        square_pixels,
        projector="model.multi_modal_projector.linear_1",
        made_by="model.multi_modal_projector",
    ),
    "aya_vision": Tiny(
        aya_vision,
        bracketed,
        square_pixels,
        projector="model.multi_modal_projector.linear_1",
        made_by="model.multi_modal_projector",
    ),
    "ovis2": Tiny(
        ovis2,
        bracketed,
        square_pixels,
        projector="model.vision_tower.head_linear",
        made_by="model.visual_embeddings_table",
    ),
    "aria": Tiny(aria, tiled, tiled_pixels, projector=None),
    "lfm2_vl": Tiny(lfm2_vl, ragged_image, ragged_pixels, projector=None),
    "got_ocr2": Tiny(got_ocr2, bracketed, large_pixels, projector=None),
    "janus": Tiny(janus, bracketed, square_pixels, projector="model.aligner"),
    "deepseek_vl": Tiny(deepseek_vl, square_image, square_pixels, projector="model.aligner"),
    "deepseek_vl_hybrid": Tiny(
        deepseek_vl_hybrid, square_image, two_pixels, projector="model.aligner", silent=SILENT
    ),
    "emu3": Tiny(
        emu3, lined_image, lined_pixels, text="model.text_model", projector=None, silent=OLD
    ),
    "chameleon": Tiny(chameleon, bracketed, square_pixels, text="model", projector=None),
    "gemma3n": Tiny(gemma3n, bracketed, square_pixels, projector=None, hidden=active),
}
