"""The row losses of the torch steps, and their derivatives."""

from __future__ import annotations

import torch
from torch import Tensor


def _cosine(p: Tensor, a: Tensor, grad: bool, coefficient: Tensor | float) -> Tensor:
    """-cos(p, a). As in `F.cosine_similarity`, both norms are clamped at 1e-8, but the derivative
    is that of p's unclamped norm."""
    norm = torch.linalg.vector_norm(p, dim=1, keepdim=True)
    p_norm = norm.clamp_min(1e-8)
    p.div_(p_norm)
    a.div_(torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp_min(1e-8))
    # From here on p is the unit vector u. Split the unit anchor into near · u, its part along p,
    # and a residual r. For nearly parallel vectors r is tiny, and u · r is accurate to eps · |r|,
    # where the cosine itself is accurate to eps only. The derivation is in docs/numerics.md, "The
    # cosine".
    near: Tensor = torch.linalg.vecdot(p, a).unsqueeze(1)
    r = a.addcmul_(p, near, value=-1)
    part: Tensor = torch.linalg.vecdot(p, r).unsqueeze(1)
    # If no norm was clamped, this saves a few passes. On a CPU the question does not make anyone
    # wait.
    if norm.device.type == "cpu" and norm.min() >= 1e-8:
        cosine = near + part
        along = part
    else:
        # |u| is less than 1 where the norm was clamped. An infinite norm leaves zeros, which take
        # the formula for 1.
        length = torch.where(norm < p_norm, norm / p_norm, 1.0)
        cosine = near * length.square() + part
        # A row of zeros does not have a direction.
        along = torch.where(length < 1, cosine / length - near, part).masked_fill_(norm == 0, 0)
    if grad:
        # d(-cos)/dp = (cos · p/|p| - a/|a|) / |p| = (along · u - r) / |p|
        scale = coefficient / p_norm
        p.mul_(along * scale).addcmul_(r, scale, value=-1)
    return -cosine


def _mse(p: Tensor, a: Tensor, grad: bool, coefficient: Tensor | float) -> Tensor:
    p.sub_(a)
    loss: Tensor = torch.linalg.vecdot(p, p).unsqueeze(1) / p.shape[1]
    if grad:
        p.mul_(coefficient * (2 / p.shape[1]))
    return loss


def _smooth_l1(p: Tensor, a: Tensor, grad: bool, coefficient: Tensor | float) -> Tensor:
    p.sub_(a)
    slope = p.clamp(-1, 1)
    loss: Tensor = torch.linalg.vecdot(slope, p.sub_(slope, alpha=0.5)).unsqueeze(1) / p.shape[1]
    if grad:
        torch.mul(slope, coefficient * (1 / p.shape[1]), out=p)
    return loss


# Each function returns the (n, 1) losses of rows p and a, in float32 or wider. It overwrites both:
# with `grad`, p becomes coefficient · dℓ/dp.
ROW_LOSSES = {"cosine": _cosine, "mse": _mse, "smooth_l1": _smooth_l1}
