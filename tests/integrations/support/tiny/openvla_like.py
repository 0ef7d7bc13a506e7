"""A vision-language-action model with the layout of OpenVLA: the patches of all images of a sample
follow its first token, and `input_ids` has no tokens for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .models import DEPTH, WIDTH, WORDS, text_config

SIDE = 8
PATCH = 4
# An image has so many patches, and both encoders together this width.
PATCHES = (SIDE // PATCH) ** 2
VISION = 20


class OpenVLALikeConfig(transformers.PretrainedConfig):
    model_type = "openvla"

    def __init__(self, text_config: Any = None, **more: Any) -> None:
        self.text_config = transformers.LlamaConfig(**(text_config or {}))
        super().__init__(**more)


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.patch_embed.num_patches = PATCHES
        self.mix = nn.Linear(width, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        return patches + self.mix(patches.cumsum(1)).tanh()


class VisionBackbone(nn.Module):
    """Two encoders, whose images are stacked in the channels; several images follow each other."""

    def __init__(self) -> None:
        super().__init__()
        self.featurizer = Encoder(VISION - 8)
        self.fused_featurizer = Encoder(8)

    def forward(self, pixels: Tensor) -> Tensor:
        images = [
            torch.cat([self.featurizer(image[:, :3]), self.fused_featurizer(image[:, 3:])], -1)
            for image in pixels.split(6, dim=1)
        ]
        return torch.cat(images, 1)


class Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(VISION, 2 * VISION)
        self.fc2 = nn.Linear(2 * VISION, WIDTH)

    def forward(self, patches: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(patches)))


class OpenVLALike(transformers.PreTrainedModel):
    config_class = OpenVLALikeConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: OpenVLALikeConfig) -> None:
        super().__init__(config)
        self.vision_backbone = VisionBackbone()
        self.projector = Projector()
        self.language_model = transformers.AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The modules' own."""

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_decoder(self) -> Any:
        return self.language_model.get_decoder()

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        pixel_values: Any = None,
        labels: Any = None,
        proprio: Any = None,
        output_hidden_states: Any = None,
    ) -> CausalLMOutputWithPast:
        more = {"labels": labels, "output_hidden_states": output_hidden_states}
        if pixel_values is None:
            return self.language_model(input_ids=input_ids, attention_mask=attention_mask, **more)
        patches = self.projector(self.vision_backbone(pixel_values))
        if proprio is not None:  # one more token behind the patches, as in OpenVLA-OFT
            patches = torch.cat([patches, proprio[:, None]], 1)

        def after_bos(rows: Tensor, inserted: Tensor) -> Tensor:
            return torch.cat([rows[:, :1], inserted, rows[:, 1:]], 1)

        size = patches.shape[:2]
        if labels is not None:
            more["labels"] = after_bos(labels, labels.new_full(size, -100))
        return self.language_model(
            inputs_embeds=after_bos(self.get_input_embeddings()(input_ids), patches),
            attention_mask=after_bos(attention_mask, attention_mask.new_ones(size)),
            **more,
        )


def openvla_like(layers: int = DEPTH) -> OpenVLALike:
    torch.manual_seed(0)
    text = text_config(num_hidden_layers=layers)
    return OpenVLALike(OpenVLALikeConfig(text_config=text)).train()


def openvla_batch(
    samples: int = 2, images: int = 1, words: int = 7, seed: int = 0
) -> dict[str, Tensor]:
    """The arguments of a forward. The first sample is shorter than the others, padded on the right;
    only the last 3 words, the action, have labels. Without images there are no pixels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (samples, words), generator=generator)
    mask = torch.ones_like(ids)
    ids[:, 0] = 1
    ids[0, -2:], mask[0, -2:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : words - 4] = -100
    pixels = torch.randn(samples, 6 * images, SIDE, SIDE, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return inputs | ({"pixel_values": pixels} if images else {})


def visual(inputs: Any, shift: int = 0) -> Tensor:
    """The mask of the patches in the decoder, or of the rows that are `shift` behind them."""
    rows = []
    for sample, ids in enumerate(inputs["input_ids"].tolist()):
        pixels = inputs.get("pixel_values")
        patches = 0 if pixels is None else PATCHES * len(pixels[sample]) // 6
        behind = len(ids) - 1 + ("proprio" in inputs)
        rows.append([False] * (1 + shift) + [True] * patches + [False] * (behind - shift))
    return torch.tensor(rows)
