"""Predictive Regularization attached to vision-language models and their trainers; imports torch
only."""

from .anchors import EncoderAnchor
from .attach import apply_pre
from .handle import PreHandle, find_handle
from .reading import ImageStates, Reader, Sample, measure
from .trainer import TrainerPatch, patch_trainer

__all__ = [
    "EncoderAnchor",
    "ImageStates",
    "PreHandle",
    "Reader",
    "Sample",
    "TrainerPatch",
    "apply_pre",
    "find_handle",
    "measure",
    "patch_trainer",
]
