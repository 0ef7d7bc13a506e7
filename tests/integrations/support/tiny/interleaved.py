"""A policy with the layout of SmolVLA and pi0: it computes the layers of a SmolVLM and of a smaller
action expert from their parts, and calls neither these layers nor the SmolVLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .models import WIDTH, WORDS, build, text_config

PATCHES = 4
SMALL = 16
TEXT = "model.vlm_with_expert.vlm.model.text_model"


class Interleaved(nn.Module):
    """A language model and an action expert, whose layers attend to the states of both."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = build("smolvlm")
        sizes = text_config(hidden_size=SMALL, head_dim=WIDTH // 2)
        self.lm_expert = transformers.LlamaModel(transformers.LlamaConfig(**sizes))
        self.checkpointing = False

    def forward(self, streams: list[Tensor]) -> list[Tensor]:
        models = [self.vlm.model.text_model, self.lm_expert]
        for layers in zip(*(model.layers for model in models), strict=True):
            if self.checkpointing:
                streams = checkpoint(self.both, layers, streams, use_reentrant=False)
            else:
                streams = self.both(layers, streams)
        return [model.norm(x) for model, x in zip(models, streams, strict=True)]

    def both(self, layers: Any, streams: list[Tensor]) -> list[Tensor]:
        normed = [layer.input_layernorm(x) for layer, x in zip(layers, streams, strict=True)]
        queries, keys, values = (
            torch.cat(
                [
                    getattr(layer.self_attn, f"{name}_proj")(x).unflatten(2, (2, -1))
                    for layer, x in zip(layers, normed, strict=True)
                ],
                1,
            ).transpose(1, 2)
            for name in "qkv"
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        results = []
        sizes = [x.shape[1] for x in streams]
        for layer, x, rows in zip(layers, streams, mixed.split(sizes, 1), strict=True):
            x = x + layer.self_attn.o_proj(rows)
            results.append(x + layer.mlp(layer.post_attention_layernorm(x)))
        return results


class Policy(nn.Module):
    """As in LeRobot, its only argument is a batch, and its config names no width."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.model = nn.Module()
        self.model.vlm_with_expert = Interleaved()
        self.model.eye = nn.Linear(5, WIDTH)
        self.model.action_in, self.model.action_out = nn.Linear(3, SMALL), nn.Linear(SMALL, 3)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        model = self.model
        words = self.get_submodule(TEXT).get_input_embeddings()(batch["tokens"])
        prefix = torch.cat([model.eye(batch["patches"]), words], 1)
        actions = model.vlm_with_expert([prefix, model.action_in(batch["noise"])])[1]
        loss = F.mse_loss(model.action_out(actions), batch["actions"])
        return loss, {"loss": loss.item()}


def policy() -> tuple[Policy, dict[str, Tensor]]:
    """The policy and a batch."""
    torch.manual_seed(0)
    return Policy().train(), {
        "tokens": torch.randint(3, WORDS, (2, 5)),
        "patches": torch.randn(2, PATCHES, 5),
        "noise": torch.randn(2, 3, 3),
        "actions": torch.randn(2, 3, 3),
    }


def prefix(inputs: dict[str, Any]) -> Tensor:
    """The mask of the patches among the rows of the language model: they come before the words."""
    samples, words = inputs["batch"]["tokens"].shape
    return (torch.arange(PATCHES + words) < PATCHES).expand(samples, -1)


def norms(policy: nn.Module) -> list[nn.Module]:
    """The modules that are called with the language model's states, from first to last."""
    text = policy.get_submodule(TEXT)
    return [*(layer.input_layernorm for layer in text.layers), text.norm]
