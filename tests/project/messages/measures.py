"""Mistakes with the measures of `pre_kernels.diagnostics`.

Given are `features` of 12 images (12, 8) and their classes, `labels`; the features of the patches
of two images, `patches` (2, 16, 8), and the `masks` of the two objects in each (2, 2, 16).
"""

from __future__ import annotations

import torch

from pre_kernels import diagnostics

from .mistakes import Mistake


def masks() -> torch.Tensor:
    halves = torch.arange(16) < 8
    return torch.stack([halves, ~halves]).expand(2, 2, 16)


GIVEN = {
    "torch": lambda: torch,
    "features": lambda: torch.randn(12, 8, generator=torch.Generator().manual_seed(0)),
    "labels": lambda: torch.arange(12) % 3,
    "patches": lambda: torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)),
    "masks": masks,
    "linear_probe": lambda: diagnostics.linear_probe,
    "cknna": lambda: diagnostics.cknna,
    "contrast_ratio": lambda: diagnostics.contrast_ratio,
    "LayerReport": lambda: diagnostics.LayerReport,
}
MISTAKES = [
    Mistake(
        "features of integers",
        "linear_probe(features.long(), labels)",
        "features: got torch.int64, want a floating point tensor (features.float() is one)",
        "linear_probe(features.float(), labels)",
    ),
    Mistake(
        "features that are not finite",
        "features[3] = torch.nan\nlinear_probe(features, labels)",
        "features: got nan or infinite values, want finite ones; features.isfinite() is False "
        "where they are",
        "features[3] = torch.nan; kept = features.isfinite().all(1)\n"
        "linear_probe(features[kept], labels[kept])",
    ),
    Mistake(
        "classes as floats",
        "linear_probe(features, labels.float())",
        "labels: got torch.float32, want an integer tensor, a class for each row (labels.long() is "
        "one)",
        "linear_probe(features, labels.long())",
    ),
    Mistake(
        "one class",
        "linear_probe(features, torch.zeros(12, dtype=torch.long))",
        "labels: got a single class, want at least two",
        "linear_probe(features, labels)",
    ),
    Mistake(
        "a class of one image",
        "labels[0] = 7; linear_probe(features, labels)",
        "labels: got a class with a single row, want at least two to split each class",
        "labels[:2] = 7; linear_probe(features, labels)",
    ),
    Mistake(
        "masks of integers",
        "contrast_ratio(patches, masks.long())",
        "masks: got torch.int64, want a bool tensor (masks.bool() is one)",
        "contrast_ratio(patches, masks.bool())",
    ),
    Mistake(
        "masks of other patches",
        "contrast_ratio(patches, masks[..., :8])",
        "masks: got shape (2, 2, 8), want (images, objects, patches) = (2, any, 16)",
        "contrast_ratio(patches, masks)",
    ),
    Mistake(
        "masks that overlap",
        "contrast_ratio(patches, masks | True)",
        "masks: some patches belong to more than one object, want at most one",
        "contrast_ratio(patches, masks)",
    ),
    Mistake(
        "more neighbours than rows",
        "cknna(features, features, neighbours=16)",
        "neighbours: got 16, want fewer than the 12 rows",
        "cknna(features, features, neighbours=11)",
    ),
    Mistake(
        "a mistyped group of metrics",
        'LayerReport(metrics=["prob"])',
        "metrics: got ['prob'], want some of structure, cosine, spectrum, cka, cknna, probe",
        'LayerReport(metrics=["probe"])',
    ),
]
