"""Predictive Regularization (PRe) for vision-language models, in fused Triton kernels.

The loss and its head are here, the equations in `pre_kernels.reference`. `pre_kernels.integrations`
attaches them to models and trainers; `pre_kernels.diagnostics` measures what a model keeps of its
visual tokens, also along a training with its `LayerCallback`, on images that its `load_samples`
reads.
"""

from . import reference
from .head import PreHead
from .loss import fused_pre_loss

__all__ = ["PreHead", "fused_pre_loss", "reference"]
__version__ = "0.1.0"
