"""Predictive Regularization (PRe) for vision-language models, in fused Triton kernels.

This module has the loss and its head; `pre_kernels.reference` has the equations in plain PyTorch.
`pre_kernels.integrations` attaches both to models and trainers. `pre_kernels.diagnostics` measures
how much of its visual tokens a model keeps. Its `LayerCallback` measures that during a training, on
images that its `load_samples` reads.
"""

from . import reference
from .head import PreHead
from .loss import fused_pre_loss

__all__ = ["PreHead", "fused_pre_loss", "reference"]
__version__ = "0.1.0"
