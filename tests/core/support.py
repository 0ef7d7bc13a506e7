"""Helpers that the tests of the loss and of PreHead share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pre_kernels import PreHead, fused_pre_loss, reference
from pre_kernels.fused.kernels.row_loss import row_loss
from pre_kernels.fused.steps_torch import ROW_LOSSES
from verify.oracle import LEAVES, MORE_LEAVES, Case, compare


def names_of(case: Case) -> list[str]:
    """Return the names of the tensors of a case that may have a gradient."""
    return [name for name in (*LEAVES, *MORE_LEAVES) if case.tensors.get(name) is not None]


def as_function(case: Case, impl: str) -> Callable[..., Tensor]:
    """Return the loss of a case as a function of its leaves."""

    def function(*leaves: Tensor) -> Tensor:
        tensors = {**case.tensors, **dict(zip(names_of(case), leaves, strict=True))}
        return fused_pre_loss(**tensors, rows=case.rows, **case.options, impl=impl)

    return function


def leaves_of(case: Case) -> list[Tensor]:
    return [case.tensors[name].clone().requires_grad_() for name in names_of(case)]


def ours(impl: str) -> Callable[..., Tensor]:
    def function(**arguments: Any) -> Tensor:
        return fused_pre_loss(**arguments, impl=impl)

    return function


def judge(impl: str, case: Case) -> dict[str, Tensor]:
    """Compare an implementation with the oracle, by the error rule. `workspace` is for ours
    alone."""
    workspace = case.options.pop("workspace", None)
    return compare(ours(impl), case, workspace=workspace)


def equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Assert that the bits are the same."""
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def upstream_of(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).reshape(loss.shape)


def head_and_inputs(
    seed: int = 0, device: torch.device | str = "cpu", **options: Any
) -> tuple[PreHead, Tensor, Tensor]:
    torch.manual_seed(seed)
    head = PreHead(16, 8, 24, **options).to(device)
    return head, torch.randn(2, 9, 16, device=device), torch.randn(2, 9, 24, device=device)


def cosine_gradient_errors(
    device: torch.device, impl: str, noise: float, width: int
) -> tuple[Tensor, Tensor]:
    """Return squared errors of the cosine's gradient, ours and those of eager in float32: of its
    elements, and of their sum over the rows.

    All predictions point roughly along their anchors, and all in one direction, so that equal
    rounding adds up in the sums.
    """

    def eager(dtype: torch.dtype) -> Tensor:
        leaf = p.to(dtype).requires_grad_()
        each = weight.to(dtype) * reference.ROW_LOSSES["cosine"](leaf, a.to(dtype))
        return torch.autograd.grad(each.sum(), leaf)[0].double()

    errors = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(20 if width < 1000 else 5):
        g = torch.Generator().manual_seed(seed)
        p = torch.randn(width, generator=g) * (0.5 + torch.rand(48, 1, generator=g))
        a = -0.37 * (p + noise * torch.randn(48, width, generator=g))
        p, a, weight = p.to(device), a.to(device), (0.1 + torch.rand(48, generator=g)).to(device)
        ours = p.clone()
        if impl == "triton":
            row_loss(ours, a, None, loss="cosine", grad=True, weight=weight)
        else:
            ROW_LOSSES["cosine"](ours, a.clone(), True, weight[:, None])
        exact = eager(torch.float64)
        for i, x in enumerate((ours.double(), eager(torch.float32))):
            errors[i] += torch.stack(
                [(x - exact).square().sum(), (x - exact).sum(0).square().sum()]
            ).cpu()
    return errors[0], errors[1]


def worse_than_eager(ours: Tensor, eager: Tensor) -> str:
    """Return the message of an assertion on the squared errors of `cosine_gradient_errors`."""
    ratios = [round(ratio, 3) for ratio in (ours / eager).sqrt().tolist()]
    return f"error ÷ eager's, of elements and of sums: {ratios}; docs/numerics.md, The cosine"
