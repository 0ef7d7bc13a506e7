"""The equations of Predictive Regularization in plain PyTorch (arXiv 2603.20808, eq. 3-5): the
oracle of every test."""

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

NORMS: dict[str, Callable[..., Tensor]] = {
    "layer": lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
    "rms": lambda x, weight, _, eps: F.rms_norm(x, x.shape[-1:], weight, eps),
}


def gram(p: Tensor, a: Tensor, images: Tensor) -> Tensor:
    """For each row the mean over the rows of its image of the squared difference between the Gram
    matrices of the unit rows of p and a: (N,). images: (N,) numbers."""
    unit_p, unit_a = (F.normalize(x, dim=-1, eps=1e-8) for x in (p, a))
    same = (images[:, None] == images).to(p.dtype)
    difference = unit_p @ unit_p.t() - unit_a @ unit_a.t()
    return (difference.square() * same).sum(1) / same.sum(1)


ROW_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda p, a: -F.cosine_similarity(p, a, dim=-1, eps=1e-8),
    "mse": lambda p, a: (p - a).square().mean(-1),
    "smooth_l1": lambda p, a: F.smooth_l1_loss(p, a, reduction="none", beta=1.0).mean(-1),
}


def _of_selection(
    values: Tensor, index: Tensor, rows: Tensor | None, leading: torch.Size
) -> Tensor:
    """Return the values of the selected rows, (N,), from these or from those of all rows."""
    masked = rows is not None and rows.dtype == torch.bool
    if values.shape != index.shape or (masked and values.shape == leading):
        return values.reshape(-1)[index]
    return values


def pre_loss(
    hidden: Tensor,
    anchor: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    rows: Tensor | None = None,
    *,
    loss: str = "cosine",
    activation: str = "gelu",
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    w3: Tensor | None = None,
    b3: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    images: Tensor | str | None = None,
) -> Tensor:
    """Compute the PRe loss of the selected rows by autograd, without fused kernels.

    Each selected row h of `hidden` passes a predictor and is compared with its anchor a. The
    predictor of PRe has two layers (arXiv 2603.20808, eq. 3-5):

        p = w2 · act(w1 · h + b1) + b2         w3 · act(p) + b3 with a w3; w1 · h + b1 without a w2
        ℓ = -cos(p, a)                         loss="cosine"
        ℓ = mean over z of (p - a)²            loss="mse"
        ℓ = mean over z of smooth_l1(p - a)    loss="smooth_l1", beta = 1
        ℓ = mean over j of (p̂·p̂_j - â·â_j)²   loss="gram": over the selected rows j of the image

    It supports whatever autograd supports: second derivatives, forward mode and the transforms of
    torch.func. It keeps all activations for the backward. It does not check its arguments.

    ```python
    hidden = torch.randn(2, 10, 64, requires_grad=True)
    anchor, visual = torch.randn(2, 10, 48), torch.rand(2, 10) < 0.5
    w1, w2 = torch.randn(64, 64), torch.randn(48, 64)
    loss = reference.pre_loss(hidden, anchor, w1, None, w2, None, visual)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    grad.square().sum().backward()  # a second derivative
    ```

    Args:
        hidden: (..., d).
        anchor: hidden's leading shape + (z,), or (N, z) in the order of the selection; never
            receives a gradient.
        w1: (m, d); without a w2 (z, d).
        b1: a bias for the rows of w1, or None; b2 and b3 alike.
        w2: (z, m); with a w3 (m2, m). None: a head of one layer.
        b2: as b1.
        rows: a bool mask of hidden's leading shape, (N,) int32 or int64 flat row indices, or None
            for all rows.
        loss: "cosine", "mse", "smooth_l1" or "gram" (p̂ is p / |p|).
        activation: "gelu" (erf), "gelu_tanh", "silu" or "relu".
        row_weight: (N,) in the order of the selection, or hidden's leading shape; multiplies the
            row losses.
        reduction: "mean" (Σ ℓ / D; D is the normalizer, else the sum of the weights, else N), "sum"
            or "none".
        normalizer: the D of "mean": a number or a 0-d tensor.
        w3: (z, m2), or None.
        b3: as b1.
        norm: None, or the norm that the selected rows of hidden pass first: "layer" or "rms".
        norm_weight, norm_bias: (d,), or None. An rms norm has no bias.
        norm_eps: added to the variance, or to the mean square.
        images: for "gram", the number of each row's image: (N,) in the order of the selection, or
            hidden's leading shape; or "batch": all selected rows form one image.

    Returns:
        A 0-d tensor, or (N,) with `reduction="none"`, in `promote_types(product dtype, float32)`.

    Raises:
        KeyError: for an unknown loss, activation or norm. Other wrong arguments fail in PyTorch.
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

    p = x[index]
    if norm is not None:
        p = NORMS[norm](p, norm_weight, norm_bias, norm_eps)
    p = F.linear(p, w1, b1)
    for w, b in ((w2, b2), (w3, b3)):
        if w is not None:
            p = F.linear(ACTIVATIONS[activation](p), w, b)
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    a = a.to(p.dtype)
    if loss == "gram":
        numbers = images if isinstance(images, Tensor) else torch.zeros_like(index)
        losses = gram(p, a, _of_selection(numbers, index, rows, leading))
    else:
        losses = ROW_LOSSES[loss](p, a)

    divisor: float | Tensor = float(index.numel())
    if row_weight is not None:
        weight = _of_selection(row_weight, index, rows, leading)
        losses = losses * weight.to(p.dtype)
        divisor = weight.to(p.dtype).sum()
    if reduction == "none":
        return losses
    if reduction == "sum" or index.numel() == 0:
        return losses.sum()
    divisor = divisor if normalizer is None else normalizer
    return losses.sum() / (math.nan if divisor == 0 else divisor)
