"""The front door: check the arguments, choose an implementation, call it."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from . import checks
from .function import Steps, pre_loss


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `impl="triton"` cannot run tensors of `device` with products in `dtype`; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "float64 has no Triton kernels"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, older than sm_80"
    return None


def choose(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs: `impl` itself, or for "auto" triton on a GPU and torch elsewhere."""
    checks.choice("impl", impl, checks.IMPLEMENTATIONS)
    if impl == "torch" or (impl == "auto" and device.type != "cuda"):
        return "torch"
    reason = unavailable(device, dtype)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise RuntimeError(f"impl: got 'triton', which cannot run here: {reason}; want 'torch' or 'auto'")
    return "torch"


def _steps(impl: str) -> type[Steps]:
    if impl == "triton":
        from .steps_triton import TritonSteps  # imports triton

        return TritonSteps
    from .steps_torch import TorchSteps

    return TorchSteps


def fused_pre_loss(
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
    impl: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    """The Predictive Regularization loss of the selected rows (arXiv 2603.20808, eq. 3-5), with a fused backward.

    Each selected row i of `hidden` passes the predictor p = w2 · act(w1 · h + b1) + b2 and is compared with its anchor
    a; the row loss is -cos(p, a), or the mean over z of (p - a)² or of smooth_l1(p - a). Gradients of the predictor and
    of `hidden` are computed chunk by chunk in the forward, so no activation is kept; `reduction="none"` and float16
    products recompute the chunks in the backward instead, where the upstream gradient is known.

    Args:
        hidden: (..., d) with at least one leading dimension; floating point of 16 bits or more, as all that follow.
        anchor: hidden's leading shape + (z,), else (N, z) in selection order; of any dtype. The leading shape
            wins where both readings fit. Never receives a gradient.
        w1, b1, w2, b2: (m, d), (m,) or None, (z, m), (z,) or None. Outside autocast of hidden's dtype.
        rows: bool mask of hidden's leading shape, or (N,) int32/int64 flat row indices in any order, or None for all.
            Indices must be unique and in range: checked on the CPU, and elsewhere under PRE_KERNELS_DEBUG=1 alone
            (checking reads the device).
        loss: "cosine", "mse" or "smooth_l1" (beta 1).
        activation: "gelu" (erf), "gelu_tanh", "silu" or "relu".
        row_weight: (N,) in selection order, or hidden's leading shape; multiplies the row losses. (N,) wins where both
            fit.
        reduction: "mean" (Σ ℓ / D; D = normalizer, else the sum of the weights, else N), "sum" or "none".
        normalizer: number or 0-d tensor, the D of "mean": under DDP, FSDP and ZeRO the global token count ÷ world size.
        impl: "triton", "torch", or "auto" = triton on a GPU and torch elsewhere.
        workspace: bytes for the buffers of one chunk; None is a default that suits the device.

    Returns:
        0-d tensor, or (N,) for "none", in the dtype of the loss arithmetic, `promote_types(product dtype, float32)`.
        N = 0 gives 0 (or shape (0,)) with zero gradients; D = 0 with N > 0 gives nan.

    Raises:
        ValueError, TypeError: for a wrong argument, naming it, what was given and what is wanted.
        RuntimeError: if `impl="triton"` cannot run here; also when differentiated twice.

    Host syncs: none for integer rows, or for a mask with leading-shape anchor and weights (Triton); a mask with "none",
    with an (N, z) anchor or with (N,) weights costs one.
    """
    problem = checks.arguments(
        hidden,
        anchor,
        w1,
        b1,
        w2,
        b2,
        rows,
        loss=loss,
        activation=activation,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=normalizer,
        workspace=workspace,
    )
    return pre_loss(problem, _steps(choose(impl, hidden.device, problem.dtype)))
