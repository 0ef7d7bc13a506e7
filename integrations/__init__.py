"""Predictive Regularization attached to vision-language models and their trainers; imports torch
only."""

from typing import TYPE_CHECKING

from pre_kernels._moved import moved

from .anchors import EncoderAnchor
from .attach import apply_pre
from .handle import PreHandle, find_handle
from .reader import ImageStates, Reader
from .trainer import TrainerPatch, patch_trainer

__all__ = [
    "EncoderAnchor",
    "ImageStates",
    "PreHandle",
    "Reader",
    "TrainerPatch",
    "apply_pre",
    "find_handle",
    "patch_trainer",
]

if not TYPE_CHECKING:  # a checker would take any name for one of the package
    __getattr__ = moved(__name__, dict.fromkeys(("Sample", "measure"), "pre_kernels.diagnostics"))
