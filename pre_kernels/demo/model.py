"""The tiny LLaVA: a CLIP vision tower, a projector and a Llama. Tower and Llama are pre-trained
here, each by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from .scenes import PATCH, SIDE, Scenes, regions
from .settings import Settings
from .stages import Advance
from .text import BEGIN, IMAGE, VOCABULARY, text_batch


def build(settings: Settings) -> LlavaForConditionalGeneration:
    """Return the untrained model."""
    width = settings.width
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=width,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=BEGIN,
        eos_token_id=None,
        pad_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # This leaves the class token out.
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def learn_to_see(
    tower: nn.Module, scenes: Scenes, settings: Settings, seed: int, advance: Advance
) -> None:
    """Train the vision tower to name the digit under each patch, as a stand-in for CLIP's
    pre-training."""
    device = next(tower.parameters()).device
    classify = nn.Linear(settings.width, 10).to(device)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        index = torch.randint(len(scenes), (2 * settings.batch,), generator=generator)
        seen = tower(
            pixel_values=scenes.images[index].to(device), output_hidden_states=True
        ).hidden_states[-1][:, 1:]
        return F.cross_entropy(
            classify(seen).flatten(0, 1), scenes.digits[index][:, regions()].flatten().to(device)
        )

    parameters = [*tower.parameters(), *classify.parameters()]
    fit(parameters, loss, settings.vision_steps, settings.vision_rate, advance)


def learn_to_read(
    language: LlamaForCausalLM, corpus: Tensor, settings: Settings, seed: int, advance: Advance
) -> None:
    """Train the LLM to continue source code."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        ids = text_batch(corpus, settings.batch, settings.text_length, generator).to(
            language.device
        )
        value: Tensor = language(input_ids=ids, labels=ids).loss
        return value

    fit(
        [*language.parameters()],
        loss,
        settings.text_steps,
        settings.text_rate,
        advance,
        weight_decay=0.1,
    )


def fit(
    parameters: list[nn.Parameter],
    loss: Callable[[], Tensor],
    steps: int,
    rate: float,
    advance: Advance,
    weight_decay: float = 0.0,
) -> None:
    """Minimise `loss()` by AdamW, with linear warm-up over at most 20 steps, then a cosine to 0."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    warm_up = min(20, steps // 4 + 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        ],
        milestones=[warm_up],
    )
    for _ in range(steps):
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        advance(value.item())
