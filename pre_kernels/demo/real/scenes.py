"""Scenes: four photographs on a noisy ground, so that the thing at every patch is known."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .photographs import CATEGORIES, LARGEST, Photograph

SIDE = 2 * LARGEST
# The encoder makes one token of this many pixels along a side.
PATCH = 32
GRID = SIDE // PATCH
PATCHES = GRID * GRID
PLACES = ("top left", "top right", "bottom left", "bottom right")
# A patch shows a thing that covers more than this share of it.
COVERED = 0.5
# The standard deviation of the ground's noise, of 255.
NOISE = 12.0


@dataclass(frozen=True)
class Scene:
    """A scene.

    `image` is (3, SIDE, SIDE), uint8. `things` has the photographs in the order of `PLACES`, and
    `masks` (4, PATCHES), bool, the patches of each.
    """

    image: Tensor
    masks: Tensor
    things: tuple[Photograph, ...]


class Scenes:
    """`count` scenes of things from `photographs`, made when they are asked for. The same seed
    gives the same scenes, and the categories are equally frequent."""

    def __init__(self, photographs: Sequence[Photograph], count: int, seed: int) -> None:
        self.kinds = [[p for p in photographs if p.category == c] for c in range(len(CATEGORIES))]
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Scene]:
        return (self[number] for number in range(self.count))

    def __getitem__(self, number: int) -> Scene:
        return compose(self.kinds, random.Random(f"{self.seed} {number}"))


def compose(kinds: Sequence[Sequence[Photograph]], chance: random.Random) -> Scene:
    """Return a scene of things drawn from `kinds`, the photographs of each category."""
    ground = np.array([chance.uniform(90, 255) for _ in range(3)])
    noise = np.random.default_rng(chance.randrange(1 << 30)).normal(0, NOISE, (SIDE, SIDE, 1))
    image = Image.fromarray((ground + noise).clip(0, 255).astype(np.uint8))
    covers = []
    things = []
    for place in range(len(PLACES)):
        thing = chance.choice(kinds[chance.randrange(len(kinds))])
        shown = _resized(thing.picture, chance.uniform(0.75, 1.0))
        left = place % 2 * LARGEST + chance.randint(0, LARGEST - shown.width)
        top = place // 2 * LARGEST + chance.randint(0, LARGEST - shown.height)
        image.paste(shown, (left, top), shown)
        cover = Image.new("L", (SIDE, SIDE), 0)
        cover.paste(shown.getchannel("A"), (left, top))
        covers.append(np.asarray(cover))
        things.append(thing)
    opaque = torch.from_numpy(np.stack(covers)) > 100
    shares = opaque.float().unflatten(1, (GRID, PATCH)).unflatten(3, (GRID, PATCH)).mean((2, 4))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return Scene(pixels, (shares > COVERED).flatten(1), tuple(things))


def _resized(picture: Image.Image, scale: float) -> Image.Image:
    width, height = (max(8, int(side * scale)) for side in picture.size)
    return picture.resize((width, height))
