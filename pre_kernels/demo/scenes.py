"""Scenes: real handwritten digits side by side, so that the object of every patch is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

# pixels along a side of scikit-learn's handwritten digits
DIGIT = 8
# pixels along a side of a patch: a digit covers 2 x 2 patches
PATCH = 4
# digits along a side of a scene
GRID = 3
SIDE = GRID * DIGIT
PATCHES = (SIDE // PATCH) ** 2
OBJECTS = GRID * GRID
MIDDLE = OBJECTS // 2


@dataclass(frozen=True)
class Scenes:
    """`images` (S, 3, SIDE, SIDE) in 0..1; of each digit, in reading order, its class 0..9 in
    `digits` (S, OBJECTS) and its number in scikit-learn's set in `sources` (S, OBJECTS)."""

    images: Tensor
    digits: Tensor
    sources: Tensor

    def __len__(self) -> int:
        return len(self.images)


def split_digits(seed: int) -> list[np.ndarray]:
    """Disjoint sets of digit images, as numbers in scikit-learn's set: 55 % to train on, 22.5 % to
    fit probes on, 22.5 % to test on."""
    from sklearn.datasets import load_digits

    order = np.random.default_rng(seed).permutation(len(load_digits().target))
    return np.split(order, (np.cumsum((0.55, 0.225)) * len(order)).astype(int))


def compose(sources: np.ndarray, count: int, seed: int) -> Scenes:
    """`count` scenes of digit images drawn from `sources`; the same ones for the same seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = np.random.default_rng(seed).choice(sources, (count, OBJECTS))
    return Scenes(drawn(chosen), torch.from_numpy(data.target[chosen]), torch.from_numpy(chosen))


def drawn(chosen: np.ndarray) -> Tensor:
    """The pictures (S, 3, SIDE, SIDE) in 0..1 of digits by their number in scikit-learn's set, (S,
    OBJECTS)."""
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images).float() / 16
    images = rearrange(pixels[chosen], "s (down right) y x -> s 1 (down y) (right x)", down=GRID)
    return images.expand(-1, 3, -1, -1)


def regions() -> Tensor:
    """The object of each patch (PATCHES,): the same in every scene."""
    cell = torch.arange(SIDE // PATCH) // (DIGIT // PATCH)
    return (cell[:, None] * GRID + cell).flatten()


def masks() -> Tensor:
    """The patches of each object (OBJECTS, PATCHES), bool."""
    return regions() == torch.arange(OBJECTS)[:, None]
