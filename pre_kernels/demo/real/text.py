"""The texts of the two stages, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .llms import Llm
from .photographs import CATEGORIES
from .scenes import PATCHES, PLACES, Scene, Scenes

IGNORED = -100
# A part of a text, and whether the model is to learn it.
Part = tuple[str, bool]
# The text of a scene.
Text = Callable[[Scene, random.Random], list[Part]]


def caption(scene: Scene, chance: random.Random) -> list[Part]:
    """Return the text of the first stage: what there is."""
    names = ", ".join(thing.name for thing in scene.things)
    return [(f" The picture shows {names}.", True)]


def questions(scene: Scene, chance: random.Random) -> list[Part]:
    """Return the text of the second stage: for each thing, in any order, which kind it is."""
    places = list(range(len(PLACES)))
    chance.shuffle(places)
    return [
        piece
        for place in places
        for piece in (
            (f"\n{PLACES[place].capitalize()}:", False),
            (f" {CATEGORIES[scene.things[place].category]}", True),
        )
    ]


class Batches:
    """Make a model's inputs from scenes; a collator of the Trainer.

    What comes before the image takes the part of the prompts of real models: an LLM gives its first
    token a role of its own (an attention sink with huge activations), which no patch should have.
    """

    def __init__(self, tokenizer: Any, llm: Llm, text: Text, scenes: Scenes) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.scenes = scenes
        self.first = self._tokens(llm.prompt) + [llm.image_token] * PATCHES

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return the inputs for the scenes with these numbers: pixel_values (B, 3, SIDE, SIDE) in
        0..255, input_ids and attention_mask (B, T), and labels, which begin with the last patch
        (ignored), as the logits do."""
        scenes = [self.scenes[number] for number in numbers]
        rows = [
            self._row(scene, random.Random(f"{self.scenes.seed} {number} text"))
            for scene, number in zip(scenes, numbers, strict=True)
        ]
        start = len(self.first)
        length = max(len(tokens) for tokens, _ in rows)
        ids = torch.full((len(rows), start + length), self.tokenizer.eos_token_id)
        ids[:, :start] = torch.tensor(self.first)
        labels = torch.full((len(rows), 1 + length), IGNORED)
        mask = torch.zeros_like(ids)
        for row, (tokens, wanted) in enumerate(rows):
            end = start + len(tokens)
            ids[row, start:end] = torch.tensor(tokens)
            labels[row, 1 : 1 + len(tokens)] = torch.tensor(wanted)
            mask[row, :end] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": torch.stack([scene.image for scene in scenes]).float(),
            "labels": labels,
            # No logits are computed for patches.
            "logits_to_keep": 1 + length,
        }

    def _row(self, scene: Scene, chance: random.Random) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, and its labels."""
        tokens: list[int] = []
        labels: list[int] = []
        for text, wanted in self.text(scene, chance):
            own = self._tokens(text)
            tokens += own
            labels += own if wanted else [IGNORED] * len(own)
        return tokens, labels

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens
