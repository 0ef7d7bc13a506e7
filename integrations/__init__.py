"""Predictive Regularization attached to vision-language models and their trainers; imports torch only."""

from .anchors import EncoderAnchor
from .attach import apply_pre
from .handle import PreHandle, find_handle
from .trainer import TrainerPatch, patch_trainer

__all__ = ["EncoderAnchor", "PreHandle", "TrainerPatch", "apply_pre", "find_handle", "patch_trainer"]
