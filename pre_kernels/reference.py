"""The equations of Predictive Regularization in plain PyTorch: the oracle of every test (arXiv
2603.20808, eq. 3-5)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}

ROW_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda p, a: -F.cosine_similarity(p, a, dim=-1, eps=1e-8),
    "mse": lambda p, a: (p - a).square().mean(-1),
    "smooth_l1": lambda p, a: F.smooth_l1_loss(p, a, reduction="none", beta=1.0).mean(-1),
}


def pre_loss(
    hidden: Tensor,
    anchor: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    rows: Tensor | None = None,
    *,
    loss: str = "cosine",
    activation: str = "gelu",
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """PRe loss of the selected rows, by autograd. Arguments as in `pre_kernels.fused_pre_loss`;
    none is checked here.

    Returns a 0-d tensor, or (N,) with `reduction="none"`, in `promote_types(product dtype,
    float32)`.
    """
    leading = hidden.shape[:-1]
    x = hidden.reshape(-1, hidden.shape[-1])
    if rows is None:
        index = torch.arange(x.shape[0], device=x.device)
    elif rows.dtype == torch.bool:
        index = rows.reshape(-1).nonzero().squeeze(1)
    else:
        index = rows.long()

    a = anchor.detach()
    if a.shape[:-1] == leading:
        a = a.reshape(-1, a.shape[-1])[index]

    p = F.linear(ACTIVATIONS[activation](F.linear(x[index], w1, b1)), w2, b2)
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    losses = ROW_LOSSES[loss](p, a.to(p.dtype))

    divisor: float | Tensor = float(index.numel())
    if row_weight is not None:
        weight = row_weight
        if weight.shape != index.shape or (
            rows is not None and rows.dtype == torch.bool and weight.shape == leading
        ):
            weight = weight.reshape(-1)[index]
        losses = losses * weight.to(p.dtype)
        divisor = weight.to(p.dtype).sum()
    if reduction == "none":
        return losses
    if reduction == "sum" or index.numel() == 0:
        return losses.sum()
    divisor = divisor if normalizer is None else normalizer
    return losses.sum() / (math.nan if divisor == 0 else divisor)
