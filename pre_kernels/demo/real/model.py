"""The little LLaVA: an EfficientNet-Lite0 of ImageNet, an untrained projector, and a text LLM that
a GGUF file holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from .llms import Llm
from .pieces import Pieces
from .scenes import SIDE, Scenes

# The last feature map of the encoder has this many channels.
CHANNELS = 1280
# The encoder was trained on pixels (x - 127) / 128.
MEAN, SCALE = 127.0, 128.0


class LiteConfig(PretrainedConfig):
    """The configuration of `LiteTower`."""

    model_type = "efficientnet_lite0"
    hidden_size = CHANNELS
    image_size = SIDE
    # LLaVA's code asks for it to count the patches of an image.
    patch_size = SIDE // 7


class LiteTower(PreTrainedModel):
    """EfficientNet-Lite0 as a vision tower of LLaVA: its last feature map as tokens, each channel
    with mean 0 and standard deviation 1 over the scenes that `fit` saw."""

    config_class = LiteConfig
    main_input_name = "pixel_values"
    mean: Tensor
    std: Tensor

    def __init__(self, config: LiteConfig) -> None:
        super().__init__(config)
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))
        # transformers does not annotate it.
        finish: Any = self.post_init
        finish()
        self.train(False)

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the weights that the network gave itself."""

    def train(self, mode: bool = True) -> LiteTower:
        """Stay in eval mode: the tower is frozen, with its batch norms."""
        super().train(False)
        return self

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the feature map (B, PATCHES, CHANNELS) of pixels in 0..255."""
        maps: Tensor = self.net.extract_features((pixel_values - MEAN) / SCALE)
        return maps.flatten(2).mT

    def forward(self, pixel_values: Tensor, **more: Any) -> BaseModelOutput:
        tokens = (self.features(pixel_values) - self.mean) / self.std
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    @torch.no_grad()
    def fit(self, scenes: Scenes, batch: int = 25) -> None:
        """Set the mean and standard deviation of each channel to those over `scenes`."""
        seen = torch.cat(
            [
                self.features(torch.stack([scenes[n].image for n in index]).float()).flatten(0, 1)
                for index in torch.arange(len(scenes)).split(batch)
            ]
        )
        self.mean.copy_(seen.mean(0))
        # A channel that shows nothing is not blown up.
        self.std.copy_(seen.std(0).clamp(min=1e-3))


AutoConfig.register(LiteConfig.model_type, LiteConfig, exist_ok=True)
AutoModel.register(LiteConfig, LiteTower, exist_ok=True)


def tokenizer(llm: Llm, pieces: Pieces) -> Any:
    return AutoTokenizer.from_pretrained(pieces.llm(llm).parent, gguf_file=pieces.llm(llm).name)


def build(llm: Llm, pieces: Pieces, scenes: Scenes, seed: int) -> LlavaForConditionalGeneration:
    """Return the model whose parts have never met: only its projector is untrained. scenes: over
    which the encoder's channels are standardised."""
    file = pieces.llm(llm)
    text = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    own = text.config
    own.quantization_config = None
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=LiteConfig(),
        text_config=own,
        image_token_index=llm.image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    # transformers' annotation of `float` does not name the class.
    untyped: Any = LlavaForConditionalGeneration(config).float()
    model: LlavaForConditionalGeneration = untyped
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    tower: Any = model.model.vision_tower
    tower.net.load_state_dict(pieces.encoder())
    tower.fit(scenes)
    model.config.use_cache = False
    model.eval()
    return model
