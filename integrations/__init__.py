"""Attach Predictive Regularization to vision-language models and their trainers.

Importing this package imports torch, and neither transformers nor a trainer.
"""

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

# Hidden from type checkers, which would otherwise accept any name as one of this package.
if not TYPE_CHECKING:
    __getattr__ = moved(__name__, dict.fromkeys(("Sample", "measure"), "pre_kernels.diagnostics"))
