"""The norm of the head's gradient as an optimizer's step takes it, also where each process has a
part of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pre_kernels import PreHead


class GradientNorm:
    """That of the last step; no host sync, and no collective but FSDP2's."""

    def __init__(self) -> None:
        self.norm = torch.zeros(())
        self.here = self.whole = 0  # elements of the gradient: in this process, in all

    def measure(self, head: nn.Module, optimizer: Any) -> None:
        """Look at the gradients there are at the beginning of a step of `optimizer`."""
        gradients = [p.grad for p in head.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        self.norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        scale = getattr(
            optimizer, "grad_scale", None
        )  # a GradScaler's, where the step itself unscales (fused)
        if scale is not None:
            self.norm = self.norm / scale.to(self.norm.device)
        self.here = sum(gradient.numel() for gradient in gradients)
        self.whole = sum(_size(module) for module in head.modules() if isinstance(module, PreHead))

    def sums(self, like: Tensor) -> Tensor:
        """[the norm's square, the number of elements] of what this process has; those of several
        are added."""
        return torch.stack([self.norm.to(like).square(), like.new_tensor(self.here)])

    def of(self, square: float, number: float) -> float | None:
        """The norm by these sums, where each element may be there several times; None where one is
        missing."""
        return math.sqrt(square * self.whole / number) if number >= self.whole > 0 else None


def _size(head: PreHead) -> int:
    """The number of elements that train, however they are split over processes."""
    sizes = {"w1": head.hidden_dim * head.dim, "b1": head.hidden_dim}
    sizes |= {"w2": head.out_dim * head.hidden_dim, "b2": head.out_dim}
    return sum(sizes[name] for name, p in head.named_parameters(recurse=False) if p.requires_grad)
