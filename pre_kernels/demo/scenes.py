"""Scenes: real handwritten digits side by side, so that the object at every patch is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

# A digit of scikit-learn's set has this many pixels along a side.
DIGIT = 8
# A patch has this many pixels along a side, so a digit covers 2 x 2 patches.
PATCH = 4
# A scene has this many digits along a side.
GRID = 3
SIDE = GRID * DIGIT
PATCHES = (SIDE // PATCH) ** 2
OBJECTS = GRID * GRID
MIDDLE = OBJECTS // 2


@dataclass(frozen=True)
class Scenes:
    """Scenes with the digits in them, in reading order.

    `images` is (S, 3, SIDE, SIDE) in 0..1. `digits` (S, OBJECTS) has the class 0..9 of each digit,
    and `sources` (S, OBJECTS) its number in scikit-learn's set.
    """

    images: Tensor
    digits: Tensor
    sources: Tensor

    def __len__(self) -> int:
        return len(self.images)


def split_digits(seed: int) -> list[np.ndarray]:
    """Return disjoint sets of digit images, as numbers in scikit-learn's set: 55 % for training,
    22.5 % to fit probes, 22.5 % for tests."""
    from sklearn.datasets import load_digits

    order = np.random.default_rng(seed).permutation(len(load_digits().target))
    return np.split(order, (np.cumsum((0.55, 0.225)) * len(order)).astype(int))


def compose(sources: np.ndarray, count: int, seed: int) -> Scenes:
    """Return `count` scenes of digit images drawn from `sources`. The same seed gives the same
    scenes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = np.random.default_rng(seed).choice(sources, (count, OBJECTS))
    return Scenes(drawn(chosen), torch.from_numpy(data.target[chosen]), torch.from_numpy(chosen))


def drawn(chosen: np.ndarray) -> Tensor:
    """Return the images (S, 3, SIDE, SIDE) in 0..1 of digits with these numbers (S, OBJECTS) in
    scikit-learn's set."""
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images).float() / 16
    images = rearrange(pixels[chosen], "s (down right) y x -> s 1 (down y) (right x)", down=GRID)
    return images.expand(-1, 3, -1, -1)


def regions() -> Tensor:
    """Return the object at each patch (PATCHES,), which is the same in every scene."""
    cell = torch.arange(SIDE // PATCH) // (DIGIT // PATCH)
    return (cell[:, None] * GRID + cell).flatten()


def masks() -> Tensor:
    """Return the patches of each object (OBJECTS, PATCHES), bool."""
    return regions() == torch.arange(OBJECTS)[:, None]
