"""The front door: check the arguments, choose an implementation, call it."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from . import checks
from .fused.function import pre_loss
from .fused.products import fastest_dtype
from .problem import Problem

# Looked up once, since Dynamo of torch 2.9 cannot trace the look-up.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `impl="triton"` or "blas" cannot run tensors of `device` with products in `dtype`; None
    if it can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype == torch.float64:
        return "float64 has no Triton kernels"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return (
            f"the tensors are on {device}, not on a GPU (TRITON_INTERPRET=1 interprets the kernels "
            "on the CPU)"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, older than sm_80"
    return None


def fp8_unavailable(device: torch.device) -> str | None:
    """Why `precision="fp8"` cannot run on `device`, where "blas" can; None if it can."""
    if device.type != "cuda":
        return None  # the kernels are interpreted
    if torch.version.hip is not None:
        return "the products' scales by row exist only for NVIDIA"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_90"
    return None


def choose(impl: str, problem: Problem) -> str:
    """The implementation that runs: `impl` itself, or for "auto" the one that is expected to be the
    fastest.

    On a GPU that is "blas", but "triton" where N stays on the device: "blas" would compute every
    row of the mask.
    """
    checks.choice("impl", impl, checks.IMPLEMENTATIONS)
    device = problem.hidden.device
    dtype = problem.options.dtype
    if problem.options.precision is not None:
        reason = unavailable(device, dtype) or fp8_unavailable(device)
        if reason is not None:
            raise RuntimeError(f"precision: got 'fp8', which cannot run here: {reason}; want None")
        if impl not in ("auto", "blas"):
            raise ValueError(f"precision: got 'fp8' with impl={impl!r}, want impl 'blas' or 'auto'")
        return "blas"
    if impl == "torch" or (impl == "auto" and device.type != "cuda"):
        return "torch"
    reason = unavailable(device, dtype)
    if reason is not None:
        if impl == "auto":
            return "torch"
        raise RuntimeError(
            f"impl: got {impl!r}, which cannot run here: {reason}; want 'torch' or 'auto'"
        )
    if impl != "auto":
        return impl
    # In float32 Triton's products have no tensor cores: they cost more than the unselected rows
    # that "blas" computes in vain.
    counted_on_device = (
        problem.masked and not problem.count_on_host and problem.options.capacity is None
    )
    return "triton" if counted_on_device and dtype != torch.float32 else "blas"


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
    capacity: int | None = None,
    precision: str | None = None,
) -> Tensor:
    """The Predictive Regularization loss of the selected rows (arXiv 2603.20808, eq. 3-5), with a
    fused backward.

    Each selected row i of `hidden` passes the predictor p = w2 · act(w1 · h + b1) + b2 and is
    compared with its anchor a; the row loss is -cos(p, a), or the mean over z of (p - a)² or of
    smooth_l1(p - a). Gradients of the predictor and of `hidden` are computed chunk by chunk in the
    forward, so no activation is kept; `reduction="none"` and float16 products recompute the chunks
    in the backward instead, where the upstream gradient is known. On a CPU products of float16 are
    taken in float32, and those of bfloat16 too where no units make them faster (`pre-kernels env`
    says).

    ```python
    hidden = torch.randn(2, 10, 64, requires_grad=True)
    anchor, visual = torch.randn(2, 10, 48), torch.rand(2, 10) < 0.5
    w1, w2 = torch.randn(64, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    loss = fused_pre_loss(hidden, anchor, w1, None, w2, None, visual)
    loss.backward()  # hidden.grad is 0 where visual is False
    ```

    Args:
        hidden: (..., d) with at least one leading dimension; floating point of 16 bits or more, as
            all that follow.
        anchor: hidden's leading shape + (z,), else (N, z) in selection order; of any dtype. The
            leading shape wins where both readings fit. Never receives a gradient.
        w1, b1, w2, b2: (m, d), (m,) or None, (z, m), (z,) or None. Outside autocast of hidden's
            dtype.
        rows: bool mask of hidden's leading shape, or (N,) int32/int64 flat row indices in any
            order, or None for all. Indices must be unique and in range: checked on the CPU, and
            elsewhere only under PRE_KERNELS_DEBUG=1 (checking reads the device).
        loss: "cosine", "mse" or "smooth_l1" (beta 1).
        activation: "gelu" (erf), "gelu_tanh", "silu" or "relu".
        row_weight: (N,) in selection order, or hidden's leading shape; multiplies the row losses.
            (N,) wins where both fit.
        reduction: "mean" (Σ ℓ / D; D = normalizer, else the sum of the weights, else N), "sum" or
            "none".
        normalizer: number or 0-d tensor, the D of "mean": under DDP, FSDP and ZeRO the global token
            count ÷ world size. With tensors on a GPU, one on the CPU is copied, which the capture
            of a CUDA graph may refuse.
        impl: "blas" (the vendor's matrix products, Triton between them), "triton" (all of it),
            "torch", or "auto": torch on the CPU; on a GPU blas, but triton in half precision where
            N of a mask stays on the device.
        workspace: bytes for the buffers of one chunk; None is a default that suits the device.
        capacity: the most rows that a mask may select; None = all. Gradients of hidden are kept for
            that many rows, and "blas" computes that many. If more are selected the result is nan,
            or a ValueError where N is on the host or under PRE_KERNELS_DEBUG=1.
        precision: "fp8" computes the four products with a weight in float8 e4m3, each row with a
            scale of its own, and the two of the weights' gradients in bfloat16; gradients have a
            few percent error. It needs bfloat16 products, widths that are multiples of 16 up to
            8,192, and "blas" on sm_90 or newer. None: no float8.

    Returns:
        0-d tensor, or (N,) for "none", in the dtype of the loss arithmetic, `promote_types(product
        dtype, float32)`.
        N = 0 gives 0 (or shape (0,)) with zero gradients; D = 0 with N > 0 gives nan.

    Raises:
        ValueError, TypeError: for a wrong argument, naming it, what was given and what is wanted.
        RuntimeError: if `impl` cannot run here; also when a gradient is differentiated again.
        NotImplementedError: under a transform of torch.func, or for an input with a forward-mode
            tangent.

    The same call gives the same bits on the same device and versions, as far as the vendor's
    products do.

    Host syncs on a GPU: none for integer rows, or for a mask with leading-shape anchor and weights;
    a mask with "none", with an (N, z) anchor or with (N,) weights costs one, and "torch" costs one
    for any mask; a backward that selects the rows anew ("none", and float16) costs the same again.
    Calls without a sync can be captured in a CUDA graph: at replay the mask may select other rows.
    Under torch.compile a call is one operator.
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
        capacity=capacity,
        precision=precision,
    )
    impl = choose(impl, problem)
    if impl == "torch":
        dtype = fastest_dtype(problem.options.dtype, problem.hidden.device)
        problem = problem._replace(options=problem.options._replace(dtype=dtype))
    return pre_loss(problem, impl)
