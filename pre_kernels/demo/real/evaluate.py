"""What the layers of a model hold of photographs that its training did not see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pre_kernels.diagnostics import LayerReport, Sample, linear_probe
from pre_kernels.integrations import Reader

from ..stages import Advance
from .llms import Llm
from .photographs import Photograph
from .scenes import Scenes
from .settings import Settings
from .text import IGNORED, Batches, questions

# What a look at an image without a text needs.
INPUTS = ("input_ids", "attention_mask", "pixel_values")
# The metrics of a LayerReport that are kept, each a list over layers.
KEPT = (
    "cohesion",
    "coupling",
    "contrast",
    "cosine",
    "effective_dimension",
    "correlation",
    "lens_share",
)


@dataclass
class Seen:
    """The things of some scenes.

    Attributes:
        means: by layer the mean of each thing's tokens, (d,).
        categories: the category of each thing.
        photographs: the number of its photograph.
        scenes: the number of its scene.
    """

    means: dict[int, list[Tensor]]
    categories: list[int]
    photographs: list[int]
    scenes: list[int]

    def features(self, layer: int) -> Tensor:
        return torch.stack(self.means[layer])

    def identity(self, layer: int, penalty: float) -> float:
        """Return how often a probe of half of the scenes recognises the photograph of a thing in
        the other half, and the other way round."""
        features = self.features(layer)
        labels = torch.tensor(self.photographs)
        first = torch.tensor(self.scenes) < (max(self.scenes) + 1) // 2
        both = [
            linear_probe(
                features[fit], labels[fit], features[~fit], labels[~fit], inverse_penalty=penalty
            )
            for fit in (first, ~first)
        ]
        return sum(both) / 2


def evaluate(
    model: Any,
    tokenizer: Any,
    llm: Llm,
    halves: Sequence[Sequence[Photograph]],
    settings: Settings,
    seed: int,
    advance: Advance = lambda loss: None,
) -> dict[str, Any]:
    """Return the metrics of one model, lists over the layers in "layers".

    Args:
        halves: two disjoint sets of photographs that no training saw. "probe" names the category of
            a thing; it is fitted on the scenes of one half and tested on those of the other, in
            both directions. "identity" names the photograph, which stage two does not ask for; it
            is fitted on half of the scenes of each half and tested on the rest.
        advance: called after each scene.
    """
    depth = model.config.text_config.num_hidden_layers
    layers = sorted({*range(0, depth, settings.every), depth // 2, depth})
    report = LayerReport(("structure", "cosine", "spectrum"))
    answers: list[bool] = []
    seen = []
    model.eval()
    device = model.device
    with Reader(model, layers) as reader:
        for half, photographs in enumerate(halves):
            scenes = Scenes(photographs, settings.test_scenes, 1000 * (seed + 1) + half)
            batches = Batches(tokenizer, llm, questions, scenes)
            seen.append(
                _read(reader, batches, photographs, report, answers, settings, device, advance)
            )
    rows = report.rows()

    def probe(layer: int) -> float:
        both = [
            linear_probe(
                fit.features(layer),
                torch.tensor(fit.categories),
                test.features(layer),
                torch.tensor(test.categories),
                inverse_penalty=settings.penalty,
            )
            for fit, test in (seen, reversed(seen))
        ]
        return sum(both) / 2

    return {
        "layers": layers,
        "accuracy": sum(answers) / len(answers),
        "probe": [probe(layer) for layer in layers],
        "identity": [
            sum(half.identity(layer, settings.penalty) for half in seen) / len(seen)
            for layer in layers
        ],
        **{name: [row[name] for row in rows] for name in KEPT},
        "words": [[tokenizer.decode(token) for token in row["lens_tokens"]] for row in rows],
    }


def _read(
    reader: Reader,
    batches: Batches,
    photographs: Sequence[Photograph],
    report: LayerReport,
    answers: list[bool],
    settings: Settings,
    device: torch.device,
    advance: Advance,
    batch: int = 10,
) -> Seen:
    """Add scenes to `report` and `answers`, and return their things."""
    seen = Seen({layer: [] for layer in reader.layers}, [], [], [])
    logits = reader.logits()
    numbers = {id(photograph): n for n, photograph in enumerate(photographs)}
    for index in torch.arange(len(batches.scenes)).split(batch):
        inputs = on(device, batches(index.tolist()))
        # As in training, since the Trainer's autocast stays around the model that it trained.
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            images, output = reader.read_with_output(inputs)
        answers += right(output.logits, inputs["labels"])
        for number, image in zip(index.tolist(), images, strict=True):
            scene = batches.scenes[number]
            # A thing that covers half of no patch is in no mask.
            shown = [n for n, mask in enumerate(scene.masks) if mask.any()]
            masks = scene.masks[shown]
            hidden = {layer: image.hidden[layer].float().cpu() for layer in reader.layers}
            report.update(
                hidden,
                image.anchor.float().cpu(),
                masks=masks,
                logits=logits if number < settings.lens_scenes else None,
            )
            for layer, h in hidden.items():
                seen.means[layer] += [h[mask].mean(0) for mask in masks]
            seen.categories += [scene.things[n].category for n in shown]
            seen.photographs += [numbers[id(scene.things[n])] for n in shown]
            seen.scenes += [number] * len(shown)
            advance(math.nan)
    return seen


def samples(tokenizer: Any, llm: Llm, scenes: Scenes) -> list[Sample]:
    """Return scenes as images for `LayerCallback`."""
    looks = Batches(tokenizer, llm, lambda scene, chance: [], scenes)
    return [
        Sample(
            {name: value for name, value in looks([number]).items() if name in INPUTS},
            masks=scene.masks[scene.masks.any(1)],
        )
        for number, scene in enumerate(scenes)
    ]


def on(device: torch.device, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with their tensors on `device`."""
    return {
        name: value.to(device) if torch.is_tensor(value) else value
        for name, value in inputs.items()
    }


def right(logits: Tensor, labels: Tensor) -> list[bool]:
    """Return for each token that is an answer whether it is the model's first choice."""
    wanted = labels[:, 1:]
    said = logits[:, :-1].argmax(-1)
    found: list[bool] = (said == wanted)[wanted != IGNORED].tolist()
    return found
