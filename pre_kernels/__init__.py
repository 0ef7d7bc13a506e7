"""Predictive Regularization (PRe) for vision-language models, in fused Triton kernels.

This module has the loss and its head; `pre_kernels.reference` has the equations in plain PyTorch.
`pre_kernels.integrations` attaches both to models and trainers. `pre_kernels.diagnostics` measures
how much of its visual tokens a model keeps. Its `LayerCallback` measures that during a training, on
images that its `load_samples` reads.

The names are imported on first use, since the command line starts with this package and torch takes
seconds.
"""

import sys
from typing import TYPE_CHECKING

# An installer checks this; a folder on sys.path is imported without one.
if sys.version_info < (3, 10):  # noqa: UP036
    raise ImportError(
        "Python: got %d.%d, want 3.10 or newer for pre_kernels" % sys.version_info[:2]  # noqa: UP031
    )

from ._lazy import lazy

if TYPE_CHECKING:
    from . import reference
    from .head import PreHead
    from .loss import fused_pre_loss

__all__ = ["PreHead", "fused_pre_loss", "reference"]
__version__ = "0.2.0"

# A type checker that saw this would accept any name as one of the package.
if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, {"loss": ("fused_pre_loss",), "head": ("PreHead",)})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
