"""The metrics of a model that the table and the plot show, on scenes that no training saw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from pre_kernels import PreHead
from pre_kernels.diagnostics import (
    Spectrum,
    SpectrumSummary,
    contrast_ratio,
    linear_probe,
    mean_cosine,
)
from pre_kernels.integrations import Reader

from .model import fit
from .scenes import Scenes, masks
from .settings import Settings
from .stages import Advance
from .text import visual_batch


@dataclass(frozen=True)
class States:
    """Hidden states of visual tokens, and whether the answers were correct.

    `hidden` (L + 1, S, PATCHES, d) has the visual tokens as they enter the LLM (0) and after each
    layer; `correct` is (S,).
    """

    hidden: Tensor
    correct: Tensor

    def objects(self, layer: int) -> Tensor:
        """Return the mean over each object's patches, (S · OBJECTS, d)."""
        member = masks().to(self.hidden)
        return ((member / member.sum(-1, keepdim=True)) @ self.hidden[layer]).flatten(0, 1)


def states(model: LlavaForConditionalGeneration, scenes: Scenes, batch: int = 250) -> States:
    """Return the hidden states of every layer on `scenes`, and whether the model's next token is
    the answer."""
    hidden: list[Tensor] = []
    correct: list[Tensor] = []
    with Reader(model) as reader:
        for index in torch.arange(len(scenes)).split(batch):
            inputs = {
                name: value.to(model.device) for name, value in visual_batch(scenes, index).items()
            }
            images, output = reader.read_with_output(inputs)
            hidden.append(
                torch.stack(
                    [torch.stack([i.hidden[n] for i in images]) for n in reader.layers]
                ).cpu()
            )
            # The answer is the last token, so the token before it predicts it.
            correct.append((output.logits[:, -2].argmax(-1) == inputs["labels"][:, -1]).cpu())
    return States(torch.cat(hidden, dim=1), torch.cat(correct))


def evaluate(
    model: LlavaForConditionalGeneration,
    fitting: Scenes,
    test: Scenes,
    settings: Settings,
    head: nn.Module | None,
    advance: Advance = lambda loss: None,
) -> dict[str, Any]:
    """Return all metrics of one model. Probes and a fresh predictor are fitted on `fitting`, and
    every metric is computed on `test`. `advance` is called after each layer's probe."""
    before = states(model, fitting)
    after = states(model, test)
    layers = range(len(after.hidden))
    contrasts = [
        contrast_ratio(after.hidden[layer], masks().expand(len(test), -1, -1)) for layer in layers
    ]
    spectra = [spectrum(after.hidden[layer]) for layer in layers]
    tokens = after.hidden.flatten(1, 2)

    def probe(layer: int) -> float:
        accuracy = linear_probe(
            before.objects(layer),
            fitting.digits.flatten(),
            after.objects(layer),
            test.digits.flatten(),
        )
        advance(math.nan)
        return accuracy

    metrics = {
        "accuracy": after.correct.double().mean().item(),
        "pre_loss": fresh_pre_loss(before, after, settings),
        "pre_loss_constant": constant_pre_loss(before, after),
        "probe": [probe(layer) for layer in layers],
        "cohesion": [c.cohesion for c in contrasts],
        "coupling": [c.coupling for c in contrasts],
        "contrast": [c.ratio for c in contrasts],
        "cosine": [mean_cosine(h, tokens[0]) for h in tokens],
        "effective_dimension": [s.effective_dimension for s in spectra],
        "correlation": [s.correlation for s in spectra],
    }
    if head is not None:
        with torch.no_grad():
            device = next(head.parameters()).device
            own = head(after.hidden[settings.pre_layer].to(device), after.hidden[0].to(device))
        metrics["pre_loss_own"] = own.item()
    return metrics


def spectrum(hidden: Tensor) -> SpectrumSummary:
    """Return the spectrum of all patches (S, PATCHES, d) of one layer."""
    patches = Spectrum()
    patches.update(hidden.flatten(0, 1))
    return patches.result()


def fresh_pre_loss(before: States, after: States, settings: Settings) -> float:
    """Return L_PRe on test scenes of a predictor that is fitted after training on frozen states, in
    the same way for every model."""
    layer = settings.pre_layer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = PreHead(before.hidden.shape[-1])
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        index = torch.randint(before.hidden.shape[1], (2 * settings.batch,), generator=generator)
        value: Tensor = head(before.hidden[layer, index], before.hidden[0, index])
        return value

    fit([*head.parameters()], loss, settings.readout_steps, 2e-3, lambda value: None)
    with torch.no_grad():
        return float(head(after.hidden[layer], after.hidden[0]))


def constant_pre_loss(before: States, after: States) -> float:
    """Return L_PRe of the best constant prediction: the mean direction of the embeddings."""
    direction = nn.functional.normalize(before.hidden[0], dim=-1).mean((0, 1))
    return -nn.functional.cosine_similarity(after.hidden[0], direction, dim=-1).mean().item()
