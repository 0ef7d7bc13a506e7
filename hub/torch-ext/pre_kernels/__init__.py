"""Predictive Regularization (PRe) for vision-language models, in fused Triton kernels.

`fused_pre_loss` is the loss, `PreHead` its predictor as a module, and `reference.pre_loss` the
equation in plain PyTorch. `layers` has a layer for `kernels.kernelize`.
"""

from . import layers, reference
from .head import PreHead
from .loss import fused_pre_loss

__all__ = ["PreHead", "fused_pre_loss", "layers", "reference"]
