"""Attach Predictive Regularization to vision-language models and their trainers.

The names are imported on first use, since the launcher starts with this package and torch takes
seconds. They import neither transformers nor a trainer.
"""

from typing import TYPE_CHECKING

from pre_kernels._lazy import lazy
from pre_kernels._moved import moved

if TYPE_CHECKING:
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

# A type checker that saw this would accept any name as one of the package.
if not TYPE_CHECKING:
    __getattr__ = moved(
        __name__,
        dict.fromkeys(("Sample", "measure"), "pre_kernels.diagnostics"),
        lazy(
            __name__,
            {
                "anchors": ("EncoderAnchor",),
                "attach": ("apply_pre",),
                "handle": ("PreHandle", "find_handle"),
                "reader": ("ImageStates", "Reader"),
                "trainer": ("TrainerPatch", "patch_trainer"),
            },
        ),
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
