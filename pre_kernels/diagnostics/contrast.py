"""Semantic contrast ratio: how much more alike the patches of one object are than patches of different objects."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ContrastRatio(NamedTuple):
    """Mean cosine similarities, each in -1..1, and their ratio; nan where there was nothing to average."""

    cohesion: float
    coupling: float
    ratio: float


def contrast_ratio(features: Tensor, masks: Tensor) -> ContrastRatio:
    """Intra-object cohesion, inter-object coupling and their ratio, the semantic contrast ratio (arXiv 2603.20808).

    With s(i, j) the cosine similarity of patches i and j of one image and O an object's patches:

        cohesion(O)    = mean of s(i, j) over i ≠ j in O                 objects of at least two patches
        coupling(O, Q) = mean of s(i, j) over i in O, j in Q             pairs of different objects of one image
        ratio          = mean cohesion / mean coupling

    The means run over all objects, and all pairs of objects, of all images, each counting once whatever its size. No
    unit; 1 means that object borders leave no trace, larger is better. The ratio is nan unless the mean coupling is
    positive. Scaling a patch and rotating the feature space change nothing. A patch of zeros has similarity 0 to all.

    Args:
        features: (images, patches, width), or (patches, width) for one image; floating point, computed in float64.
        masks: (images, objects, patches), or (objects, patches); bool, no patch in two objects, patches in none are
            background. Objects without patches are padding, so images may have different numbers of objects.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted.
    """
    if not torch.is_tensor(features) or not features.is_floating_point():
        raise TypeError(f"features: got {_describe(features)}, want a floating point tensor")
    if not torch.is_tensor(masks) or masks.dtype != torch.bool:
        raise TypeError(f"masks: got {_describe(masks)}, want a bool tensor")
    if features.dim() == 2 and masks.dim() == 2:
        features, masks = features[None], masks[None]
    if features.dim() != 3:
        raise ValueError(f"features: got shape {tuple(features.shape)}, want (images, patches, width)")
    images, patches, _ = features.shape
    if masks.dim() != 3 or masks.shape[0] != images or masks.shape[2] != patches:
        raise ValueError(
            f"masks: got shape {tuple(masks.shape)}, want (images, objects, patches) = ({images}, any, {patches})"
        )
    if masks.sum(1).gt(1).any():
        raise ValueError("masks: some patches belong to more than one object, want at most one")
    if not features.isfinite().all():
        raise ValueError("features: got nan or infinite values, want finite ones")

    x = features.double()
    # each patch by its own largest entry first, so that no norm over- or underflows
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x = torch.nn.functional.normalize(x, dim=-1)
    member = masks.to(x.device, x.dtype)
    size = member.sum(-1)  # (images, objects)
    # a sum of similarities over pairs is the product of the sums of unit vectors: no patch-by-patch matrix
    total = torch.einsum("iop,ipd->iod", member, x)
    self_similarity = torch.einsum("iop,ip->io", member, x.square().sum(-1))
    pairs = total @ total.transpose(1, 2)  # (images, objects, objects)

    within = (pairs.diagonal(dim1=1, dim2=2) - self_similarity) / (size * (size - 1))
    cohesion = within[size >= 2].mean().item()
    between = pairs / (size[:, :, None] * size[:, None, :])
    present = size > 0
    both = (present[:, :, None] & present[:, None, :]).triu(diagonal=1)
    coupling = between[both].mean().item()
    return ContrastRatio(cohesion, coupling, cohesion / coupling if coupling > 0 else math.nan)


def _describe(value: object) -> str:
    return str(value.dtype) if torch.is_tensor(value) else type(value).__name__
