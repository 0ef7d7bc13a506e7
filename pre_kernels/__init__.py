"""Predictive Regularization (PRe) for vision-language models, in fused Triton kernels."""

from . import reference
from .head import PreHead
from .loss import fused_pre_loss

__all__ = ["PreHead", "fused_pre_loss", "reference"]
__version__ = "0.1.0"
