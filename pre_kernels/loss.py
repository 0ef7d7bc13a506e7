"""The entry point: check the arguments, choose an implementation, call it."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from . import checks
from .fused.function import pre_loss
from .fused.products import fastest_dtype
from .problem import Problem

# The look-up stands here because Dynamo of torch 2.9 cannot trace it.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why `impl="triton"` or "blas" cannot run tensors of `device` with products in `dtype`,
    or None if it can."""
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
    """Return why `precision="fp8"` cannot run on `device`, where "blas" can, or None if it can."""
    if device.type != "cuda":
        return None  # Here the kernels are interpreted.
    if torch.version.hip is not None:
        return "the products' scales by row exist only for NVIDIA"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_90"
    return None


def choose(impl: str, problem: Problem) -> str:
    """Return the implementation to run: `impl` itself, or for "auto" the one that is expected to be
    the fastest.

    On a GPU that is "blas". It is "triton" where N stays on the device, because "blas" would
    compute every row of the mask.
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
    # In float32 Triton's products do not use tensor cores. They cost more than "blas" spends on the
    # unselected rows.
    counted_on_device = (
        problem.masked and not problem.count_on_host and problem.options.capacity is None
    )
    return "triton" if counted_on_device and dtype != torch.float32 else "blas"


def fused_pre_loss(
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
    impl: str = "auto",
    workspace: int | None = None,
    capacity: int | None = None,
    precision: str | None = None,
    w3: Tensor | None = None,
    b3: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    images: Tensor | str | None = None,
) -> Tensor:
    """Compute the Predictive Regularization (PRe) loss of the selected rows, with a fused backward.

    Each selected row h of `hidden` passes a predictor and is compared with its anchor a. The
    predictor of PRe has two layers (arXiv 2603.20808, eq. 3-5):

        p = w2 · act(w1 · h + b1) + b2         w3 · act(p) + b3 with a w3; w1 · h + b1 without a w2
        ℓ = -cos(p, a)                         loss="cosine"
        ℓ = mean over z of (p - a)²            loss="mse"
        ℓ = mean over z of smooth_l1(p - a)    loss="smooth_l1", beta = 1
        ℓ = mean over j of (p̂·p̂_j - â·â_j)²   loss="gram": over the selected rows j of the image

    The forward computes the gradients of the predictor and of `hidden` chunk by chunk, so it keeps
    no activation. With `reduction="none"` and with float16 products the backward computes the
    chunks again instead, because it has to know the upstream gradient before it rounds.

    ```python
    hidden = torch.randn(2, 10, 64, requires_grad=True)
    anchor, visual = torch.randn(2, 10, 48), torch.rand(2, 10) < 0.5
    w1, w2 = torch.randn(64, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    loss = fused_pre_loss(hidden, anchor, w1, None, w2, None, visual)
    loss.backward()  # hidden.grad is 0 where visual is False
    ```

    Args:
        hidden: (..., d) with at least one leading dimension. The dtype is float16, bfloat16,
            float32 or float64, as for all floating tensors below.
        anchor: hidden's leading shape + (z,), or (N, z) in the order of the selection, in any
            floating dtype. Where both readings fit, it is the leading shape. It never receives a
            gradient.
        w1: (m, d); without a w2 (z, d). Outside autocast all weights and biases must have hidden's
            dtype. Under autocast the matmuls run in autocast's dtype.
        b1: a bias for the rows of w1, or None; b2 and b3 alike.
        w2: (z, m); with a w3 (m2, m). None: a head of one layer, without an activation.
        b2: as b1.
        rows: a bool mask of hidden's leading shape, or (N,) int32 or int64 flat row indices in any
            order, or None for all rows. Indices must be unique and in range. This is checked on the
            CPU, and on other devices only under PRE_KERNELS_DEBUG=1, because the check reads the
            device.
        loss: "cosine", "mse", "smooth_l1", or "gram" (p̂ is p / |p|), whose mean over the rows of
            an image is the mean squared difference of the two Gram matrices. It takes 6·n²·z FLOP
            more for an image of n rows, and the memory of at most one image's matrix. A chunk holds
            whole images. Its matmuls are the vendor's with each `impl`.
        activation: "gelu" (erf), "gelu_tanh", "silu" or "relu".
        row_weight: (N,) in the order of the selection, or hidden's leading shape; multiplies the
            row losses. Where both readings fit, it is (N,). None: every weight is 1.
        reduction: "mean" (Σ ℓ / D; D is the normalizer, else the sum of the weights, else N), "sum"
            or "none".
        normalizer: the D of "mean": a number or a 0-d tensor. Under DDP, FSDP and ZeRO, pass the
            global token count divided by the world size. If the other tensors are on a GPU, a
            normalizer on the CPU is copied there, which the capture of a CUDA graph may refuse.
        impl: "blas" (matmuls by the vendor's library, Triton kernels for the rest), "triton"
            (Triton kernels for everything), "torch" (plain PyTorch), or "auto": "torch" on the CPU;
            on a GPU "blas", or "triton" in half precision where the N of a mask stays on the
            device.
        workspace: bytes for the buffers of one chunk. None: 544 MiB with "blas" and "triton"; with
            "torch" 256 MiB on a GPU and at most 32 MiB on a CPU (512 MiB for products in bfloat16).
        capacity: an upper bound on the rows that a mask may select; None: all rows. Gradients of
            `hidden` are stored for that many rows, and "blas" computes that many. If the mask
            selects more, the result is nan, or a ValueError where the host knows N or under
            PRE_KERNELS_DEBUG=1.
        precision: "fp8" computes the four matmuls with a weight in float8 (e4m3, one scale per
            row), and the two for the gradients of the weights in bfloat16; gradients have a few
            percent error. It needs bfloat16 products, widths that are multiples of 16 up to 8,192,
            and "blas" on an NVIDIA GPU with sm_90 or newer. None: no float8.
        w3: (z, m2), or None.
        b3: as b1.
        norm: the norm that the selected rows of hidden pass first: "layer", "rms", or None. It
            reads hidden again in the backward, so hidden must not be changed in between.
        norm_weight, norm_bias: (d,), or None. An rms norm has no bias.
        norm_eps: added to the variance ("layer") or to the mean square ("rms").
        images: for "gram", the number of each row's image: int32 or int64, (N,) in the order of the
            selection, or hidden's leading shape. The selected rows of an image follow each other,
            and are at least two. "batch": all selected rows form one image.

    Returns:
        A 0-d tensor, or (N,) for "none". Its dtype is that of the loss arithmetic, which is
            `promote_types(product dtype, float32)`. If N = 0 the result is 0 (or has shape (0,))
            and the gradients are zero. If D = 0 and N > 0 the result is nan.

    Raises:
        ValueError: for a wrong value or shape. The message is `name: got X, want Y`.
        TypeError: for a wrong type or dtype, with the same message.
        RuntimeError: if `impl` or `precision` cannot run here, or if a gradient is differentiated
            again.
        NotImplementedError: under a transform of torch.func, or for an input with a forward-mode
            tangent.

    With "torch" on a CPU, float16 matmuls run in float32. So do bfloat16 matmuls if the CPU has no
    instructions that make them faster (`pre-kernels env` prints which dtypes it takes).

    The same call gives the same bits on the same device and versions, provided that the vendor's
    matmuls do.

    Host syncs on a GPU: integer rows cost none, and neither does a mask with an anchor and weights
    of the leading shape. A mask with "none", with an (N, z) anchor or with (N,) weights costs one.
    Numbers of images cost one, unless they are (N,) on the CPU, and so does a mask with "gram".
    "torch" costs one for any mask. A backward that computes the chunks again costs the same once
    more. A CUDA graph can capture calls without a sync; at replay the mask may select other rows.
    Under torch.compile a call is one operator.
    """
    problem = checks.arguments(
        hidden,
        anchor,
        {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "w3": w3, "b3": b3},
        rows,
        loss=loss,
        activation=activation,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=normalizer,
        workspace=workspace,
        capacity=capacity,
        precision=precision,
        norm=(norm, norm_weight, norm_bias, norm_eps),
        images=images,
    )
    impl = choose(impl, problem)
    if impl == "torch":
        dtype = fastest_dtype(problem.options.dtype, problem.hidden.device)
        problem = problem._replace(options=problem.options._replace(dtype=dtype))
    return pre_loss(problem, impl)
