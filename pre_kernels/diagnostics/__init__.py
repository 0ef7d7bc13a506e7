"""What the paper measures on hidden states of visual tokens, as pure functions of tensors (arXiv 2603.20808)."""

from .contrast import ContrastRatio, contrast_ratio
from .probe import linear_probe

__all__ = ["ContrastRatio", "contrast_ratio", "linear_probe"]
