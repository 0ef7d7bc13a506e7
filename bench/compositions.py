"""Other ways to compute the same loss, composed from PyTorch and other libraries. Each is a row of
the table of baselines."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pre_kernels import reference

Loss = Callable[..., Tensor]


def compiled(**options: Any) -> Loss:
    return torch.compile(reference.pre_loss, **options)


def addmm_activation(
    hidden: Tensor,
    anchor: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    rows: Tensor,
    activation: str,
) -> Tensor:
    """Compute bias and gelu in the epilogue of the first matmul: the tanh gelu on CUDA, the erf
    gelu on a CPU."""
    x, a = _selected(hidden, anchor, rows)
    g = _LinearGelu.apply(x, w1, b1, "tanh" if activation == "gelu_tanh" else "none")
    return _mean_cosine(F.linear(g, w2, b2), a)


class _LinearGelu(torch.autograd.Function):
    """A linear layer with gelu. `torch._addmm_activation` keeps no pre-activation and has no
    derivative, so the backward takes a seventh matmul."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x, w, b)
        ctx.approximate = approximate
        return torch._addmm_activation(b, x, w.t(), use_gelu=True)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b = ctx.saved_tensors
        z = torch.addmm(b, x, w.t())
        dz = torch.ops.aten.gelu_backward(upstream, z, approximate=ctx.approximate)
        return dz @ w, dz.t() @ x, dz.sum(0), None


def liger(**options: Any) -> Loss:
    """Compute the first linear layer and gelu in eager, and the second layer and the cosine in
    Liger's chunked distillation loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss

    distillation = LigerFusedLinearCosineSimilarityLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, temperature=1.0, **options
    )

    def loss(
        hidden: Tensor, anchor: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: Tensor
    ) -> Tensor:
        x, a = _selected(hidden, anchor, rows)
        # The hard loss needs labels, and has a weight of 0.
        labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        teacher = _identity(a.shape[1], a.dtype, a.device)
        # Liger's row loss is 1 - cos.
        return distillation(F.gelu(F.linear(x, w1, b1)), w2, a, teacher, labels, b2) - 1

    return loss


@cache
def _identity(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(width, dtype=dtype, device=device)


def quack() -> Loss:
    """Compute QuACK's MLP over the selected rows, then the cosine loss under torch.compile.

    The weights of the case replace the module's own. On a device or at widths that its fused
    matmuls do not support the module silently falls back to PyTorch. The table of baselines
    excludes such devices, and such widths raise here.
    """
    from quack.mlp import MLP

    row_loss = torch.compile(_mean_cosine)
    modules: dict[tuple[int, ...], torch.nn.Module] = {}

    def loss(
        hidden: Tensor,
        anchor: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        rows: Tensor,
        activation: str,
    ) -> Tensor:
        if b1 is not None or b2 is not None or activation != "gelu_tanh":
            raise ValueError("quack: its fused training step has gelu_tanh and no biases")
        widths = (w1.shape[1], w1.shape[0], w2.shape[0])
        if any(width % 8 for width in widths):
            raise ValueError(f"quack: widths {widths}, its fused matmuls need multiples of 8")
        if widths not in modules:
            # These weights are never read, and take no memory.
            modules[widths] = MLP(*widths, activation="gelu_tanh_approx", device="meta")
        x, a = _selected(hidden, anchor, rows)
        weights = {"fc1.weight": w1, "fc2.weight": w2}
        return row_loss(torch.func.functional_call(modules[widths], weights, (x,)), a)

    return loss


def viral(
    hidden: Tensor, anchor: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: Tensor
) -> Tensor:
    """Apply the predictor to every token, then pick the visual ones in a loop over the samples."""
    mask = rows
    if rows.dtype != torch.bool:
        mask = torch.zeros(hidden.shape[:-1], dtype=torch.bool, device=rows.device)
        mask.view(-1)[rows] = True
    p = F.linear(F.gelu(F.linear(hidden, w1, b1)), w2, b2)
    wide = torch.promote_types(p.dtype, torch.float32)
    losses = [
        reference.ROW_LOSSES["cosine"](p[i][mask[i]].to(wide), anchor[i][mask[i]].to(wide))
        for i in range(len(hidden))
    ]
    return torch.cat(losses).mean()


def _selected(hidden: Tensor, anchor: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    index = rows.reshape(-1).nonzero().squeeze(1) if rows.dtype == torch.bool else rows
    return hidden.flatten(0, -2)[index], anchor.flatten(0, -2)[index]


def _mean_cosine(p: Tensor, a: Tensor) -> Tensor:
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    return reference.ROW_LOSSES["cosine"](p, a.to(p.dtype)).mean()
