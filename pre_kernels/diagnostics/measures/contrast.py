"""Semantic contrast ratio: how much more similar the patches of one object are than patches of
different objects."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import inputs


class ContrastRatio(NamedTuple):
    """Two mean cosine similarities, each in -1..1, and their ratio. A value is nan if there was
    nothing to average."""

    cohesion: float
    """The mean within objects."""
    coupling: float
    """The mean between objects."""
    ratio: float
    """cohesion / coupling."""


def contrast_ratio(features: Tensor, masks: Tensor) -> ContrastRatio:
    """Intra-object cohesion, inter-object coupling and their ratio, the semantic contrast ratio
    (arXiv 2603.20808).

    With s(i, j) the cosine similarity of patches i and j of one image, and O, Q the patches of an
    object:

        cohesion(O)    = mean of s(i, j) over i ≠ j in O      objects of at least two patches
        coupling(O, Q) = mean of s(i, j) over i in O, j in Q  pairs of different objects, one image
        ratio          = mean cohesion / mean coupling

    The mean cohesion is over all objects of all images, the mean coupling over all pairs of objects
    of all images. Each object and each pair counts once, whatever its size. The ratio has no unit.
    1 means that object borders leave no trace; larger is better. The ratio is nan unless the mean
    coupling is positive. Scaling a patch, rotating the feature space and reordering the patches
    (with their masks) change nothing. Moving the origin changes the result. A patch of zeros has
    similarity 0 to all patches.

    ```python
    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    >>> masks = torch.tensor([[True, True, False, False], [False, False, True, True]])
    >>> round(contrast_ratio(features, masks).ratio, 3)
    1.414

    ```

    Args:
        features: (images, patches, width), or (patches, width) for one image. Floating point,
            computed in float64.
        masks: (images, objects, patches), or (objects, patches) for one image. Bool. No patch is in
            two objects; a patch in no object is background. An object without patches is padding,
            so images may have different numbers of objects.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """
    contrast = Contrast()
    contrast.update(features, masks)
    return contrast.result()


class Contrast:
    """`contrast_ratio` over a stream of images. Keeps four numbers, however many images come.

    `update` takes the same arguments as the function. If it raises, the sums are unchanged.
    """

    def __init__(self) -> None:
        # Sums of similarities within and between objects, and how many terms each sum has.
        self._within = 0.0
        self._objects = 0
        self._between = 0.0
        self._pairs = 0

    def update(self, features: Tensor, masks: Tensor) -> None:
        """Add images."""
        x = inputs.images(features)
        masks = check_masks(masks, x)
        images = inputs.chunk(x)
        for part, member in zip(x.split(images), masks.split(images), strict=True):
            self.add(inputs.unit(part), member)

    def add(self, unit: Tensor, masks: Tensor) -> None:
        """Add images whose arguments are checked: `inputs.unit` of (images, patches, width), and
        masks (images, objects, patches)."""
        member = masks.to(unit.device, unit.dtype)
        size = member.sum(-1)  # (images, objects)
        # The sum of similarities over pairs is the dot product of the sums of unit vectors. So no
        # patch-by-patch matrix is needed.
        total = member @ unit
        # The length of a unit vector is 1. It is 0 for a patch of zeros.
        length = torch.linalg.vector_norm(unit, dim=-1)
        itself = (member @ length.square()[..., None]).squeeze(-1)
        pairs = total @ total.transpose(1, 2)  # (images, objects, objects)

        several = size >= 2
        present = size > 0
        within = (pairs.diagonal(dim1=1, dim2=2) - itself) / (size * (size - 1))
        both = (present[:, :, None] & present[:, None, :]).triu(diagonal=1)
        between = pairs / (size[:, :, None] * size[:, None, :])
        sums = torch.stack(
            [within[several].sum(), several.sum(), between[both].sum(), both.sum()]
        ).tolist()
        self._within += sums[0]
        self._objects += int(sums[1])
        self._between += sums[2]
        self._pairs += int(sums[3])

    def merge(self, other: Contrast) -> None:
        """Add the images that another `Contrast` has seen."""
        self._within += other._within
        self._objects += other._objects
        self._between += other._between
        self._pairs += other._pairs

    def result(self) -> ContrastRatio:
        """The means and the ratio over all images so far."""
        cohesion = self._within / self._objects if self._objects else math.nan
        coupling = self._between / self._pairs if self._pairs else math.nan
        return ContrastRatio(cohesion, coupling, cohesion / coupling if coupling > 0 else math.nan)


def check_masks(masks: object, features: Tensor) -> Tensor:
    """`masks` as (images, objects, patches), checked against `features` (images, patches,
    width)."""
    if not torch.is_tensor(masks) or masks.dtype != torch.bool:
        raise TypeError(
            f"masks: got {inputs.describe(masks)}, want a bool tensor (masks.bool() is one)"
        )
    if masks.dim() == 2 and len(features) == 1:
        masks = masks[None]
    images, patches, _ = features.shape
    if masks.dim() != 3 or masks.shape[0] != images or masks.shape[2] != patches:
        raise ValueError(
            f"masks: got shape {tuple(masks.shape)}, want (images, objects, patches) = ({images}, "
            f"any, {patches})"
        )
    if masks.sum(1).gt(1).any():
        raise ValueError("masks: some patches belong to more than one object, want at most one")
    return masks
