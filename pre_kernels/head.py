"""PreHead: the predictor as a module whose own forward uses its own parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .loss import fused_pre_loss


class Uncast:
    """A wrapper that hides a tensor keyword of `PreHead.forward` from FSDP, which casts the tensors
    that it finds in arguments."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class PreHead(nn.Module):
    """The two-layer predictor of PRe together with its loss (arXiv 2603.20808, eq. 3-5).

    The predictor is `p = w2 · act(w1 · h + b1) + b2`. Its parameters are raw `nn.Parameter`s in
    `nn.Linear`'s layout: `w1` (hidden_dim, dim), `b1` (hidden_dim,), `w2` (out_dim, hidden_dim),
    `b2` (out_dim,). `forward` returns the loss, so DDP, FSDP, ZeRO-3 and LoRA handle the head like
    any other module.

    ```python
    head = PreHead(dim=64, out_dim=48)
    hidden = torch.randn(2, 10, 64, requires_grad=True)
    anchor, visual = torch.randn(2, 10, 48), torch.rand(2, 10) < 0.5
    head(hidden, anchor, rows=visual).backward()
    ```

    Args:
        dim: the width d of the hidden states.
        hidden_dim: the width m between the two layers; None: `dim`.
        out_dim: the width z of the anchors; None: `dim`.
        bias: whether both layers have a bias. Without it `b1` and `b2` are None.
        activation: "gelu" (erf), "gelu_tanh", "silu" or "relu".
        loss: "cosine", "mse" or "smooth_l1"; `forward(loss=...)` overrides it for one call.
        device: where the parameters are; None: PyTorch's default device.
        dtype: float16, bfloat16, float32 or float64; None: PyTorch's default dtype.

    Raises:
        ValueError: for a width below 1, or an unknown activation or loss.
        TypeError: for a width that is not an int, or another dtype.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        out_dim: int | None = None,
        *,
        bias: bool = True,
        activation: str = "gelu",
        loss: str = "cosine",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make both layers, initialised as `nn.Linear` initialises its own."""
        super().__init__()
        checks.width("dim", dim)
        hidden_dim = dim if hidden_dim is None else checks.width("hidden_dim", hidden_dim)
        out_dim = dim if out_dim is None else checks.width("out_dim", out_dim)
        checks.choice("activation", activation, checks.ACTIVATIONS)
        checks.choice("loss", loss, checks.LOSSES)
        if dtype is not None and not (
            isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        ):
            raise TypeError(
                f"dtype: got {dtype!r}, want torch.float16, torch.bfloat16, torch.float32 or "
                "torch.float64"
            )
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.out_dim = out_dim
        self.activation = activation
        self.loss = loss

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w1 = parameter(hidden_dim, dim)
        self.b1 = parameter(hidden_dim) if bias else None
        self.w2 = parameter(out_dim, hidden_dim)
        self.b2 = parameter(out_dim) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters as `nn.Linear` does: uniform in ±1/sqrt(fan_in)."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound)
            if bias is not None:
                bias.uniform_(-bound, bound)

    def forward(
        self, hidden: Tensor, anchor: Tensor, rows: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Compute the PRe loss of `hidden` against `anchor`, by `fused_pre_loss`.

        Mixed precision of FSDP casts the tensors that it passes to a sharded module: in bfloat16 a
        `normalizer` or `row_weight` is off by up to 0.4 %. `head.Uncast(tensor)` keeps the dtype.

        Args:
            hidden: (..., dim), outside autocast in the dtype of the parameters.
            anchor: hidden's leading shape + (out_dim,), or (N, out_dim) for the N selected rows.
            rows: a bool mask of hidden's leading shape, (N,) int32 or int64 indices, or None for
                all rows.
            options: further keywords of `fused_pre_loss`. `loss` and `activation` default to the
                head's.

        Returns:
            A 0-d tensor, or (N,) with `reduction="none"`.

        It raises the errors of `fused_pre_loss`.
        """
        options = {
            name: value.tensor if isinstance(value, Uncast) else value
            for name, value in options.items()
        }
        options.setdefault("loss", self.loss)
        options.setdefault("activation", self.activation)
        return fused_pre_loss(hidden, anchor, self.w1, self.b1, self.w2, self.b2, rows, **options)

    def extra_repr(self) -> str:
        """Return widths, activation and loss, for `repr`."""
        return (
            f"dim={self.dim}, hidden_dim={self.hidden_dim}, out_dim={self.out_dim}, "
            f"bias={self.b1 is not None}, activation={self.activation!r}, loss={self.loss!r}"
        )
