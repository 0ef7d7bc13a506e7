"""PreHead: the predictor as a module whose own forward uses its own parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .loss import fused_pre_loss

PARAMETERS = ("w1", "b1", "w2", "b2", "w3", "b3", "norm_weight", "norm_bias")
# The keywords of the loss that are attributes of the head.
OPTIONS = ("loss", "activation", "norm", "norm_eps", *PARAMETERS[4:])


class Uncast:
    """A wrapper that hides a tensor keyword of `PreHead.forward` from FSDP, which casts the tensors
    that it finds in arguments."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class PreHead(nn.Module):
    """The predictor of PRe together with its loss (arXiv 2603.20808, eq. 3-5).

    The predictor is `p = w2 · act(w1 · h + b1) + b2`. Its parameters are raw `nn.Parameter`s in
    `nn.Linear`'s layout: `w1` (hidden_dim, dim), `b1` (hidden_dim,), `w2` (out_dim, hidden_dim),
    `b2` (out_dim,). Related works have heads of another depth, or with a norm in front; what such a
    head lacks of `w1`, `b1`, `w2`, `b2`, `w3`, `b3`, `norm_weight` and `norm_bias` is None.
    `forward` returns the loss, so DDP, FSDP, ZeRO-3 and LoRA handle the head like any other module.

    ```python
    head = PreHead(dim=64, out_dim=48)
    hidden = torch.randn(2, 10, 64, requires_grad=True)
    anchor, visual = torch.randn(2, 10, 48), torch.rand(2, 10) < 0.5
    head(hidden, anchor, rows=visual).backward()
    ```

    Attributes:
        shapes: the shapes of the whole parameters by name, also where they are split.

    Args:
        dim: the width d of the hidden states.
        hidden_dim: the width m between the layers; None: `dim`.
        out_dim: the width z of the anchors; None: `dim`.
        bias: whether the layers have a bias, and the norm "layer".
        activation: "gelu" (erf), "gelu_tanh", "silu" or "relu".
        loss: "cosine", "mse", "smooth_l1" or "gram"; `forward(loss=...)` overrides it for one call.
        device: where the parameters are; None: PyTorch's default device.
        dtype: float16, bfloat16, float32 or float64; None: PyTorch's default dtype.
        depth: the number of layers: 1, 2 or 3.
        norm: the norm of the hidden states in front of the first layer: "layer", "rms", or None.
        norm_eps: added to the variance of the norm.
        dropout: must be 0. Related works have it in their heads, and the fused backward keeps no
            activation on which a mask could act twice.

    Raises:
        ValueError: for a width below 1, an unknown activation, loss, depth or norm, or a dropout.
        TypeError: for a width that is not an int, or another dtype.
    """

    w1: nn.Parameter
    b1: nn.Parameter | None
    w2: nn.Parameter | None
    b2: nn.Parameter | None
    w3: nn.Parameter | None
    b3: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

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
        depth: int = 2,
        norm: str | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        """Make the layers, initialised as `nn.Linear` and `nn.LayerNorm` initialise their own."""
        super().__init__()
        checks.width("dim", dim)
        hidden_dim = dim if hidden_dim is None else checks.width("hidden_dim", hidden_dim)
        out_dim = dim if out_dim is None else checks.width("out_dim", out_dim)
        checks.choice("activation", activation, checks.ACTIVATIONS)
        checks.choice("loss", loss, checks.ALL_LOSSES)
        if type(depth) is not int or depth not in (1, 2, 3):
            raise ValueError(f"depth: got {depth!r}, want 1, 2 or 3 layers")
        if norm is not None:
            checks.choice("norm", norm, checks.NORMS)
        if dropout:
            raise ValueError(
                f"dropout: got {dropout!r}, want 0: the fused loss keeps no activations, and so no "
                "mask of dropped ones for the backward"
            )
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
        self.depth = depth
        self.norm = norm
        self.norm_eps = checks.nonnegative("norm_eps", norm_eps)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        widths = (dim, *[hidden_dim] * (depth - 1), out_dim)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(1, depth + 1):
            self.shapes[f"w{layer}"] = (widths[layer], widths[layer - 1])
            if bias:
                self.shapes[f"b{layer}"] = (widths[layer],)
        if norm is not None:
            self.shapes["norm_weight"] = (dim,)
        if norm == "layer" and bias:
            self.shapes["norm_bias"] = (dim,)
        for name in PARAMETERS:
            setattr(self, name, parameter(*self.shapes[name]) if name in self.shapes else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the layers as `nn.Linear` does, uniform in ±1/sqrt(fan_in), and the norm as
        `nn.LayerNorm` does, by ones and zeros."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2), (self.w3, self.b3)):
            if weight is None:
                continue
            bound = 1 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound)
            if bias is not None:
                bias.uniform_(-bound, bound)
        if self.norm_weight is not None:
            self.norm_weight.fill_(1)
        if self.norm_bias is not None:
            self.norm_bias.zero_()

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
        given = {
            name: value.tensor if isinstance(value, Uncast) else value
            for name, value in options.items()
        }
        options = {name: getattr(self, name) for name in OPTIONS} | given
        return fused_pre_loss(hidden, anchor, self.w1, self.b1, self.w2, self.b2, rows, **options)

    def extra_repr(self) -> str:
        """Return widths, depth, norm, activation and loss, for `repr`."""
        return (
            f"dim={self.dim}, hidden_dim={self.hidden_dim}, out_dim={self.out_dim}, "
            f"depth={self.depth}, norm={self.norm!r}, bias={self.b1 is not None}, "
            f"activation={self.activation!r}, loss={self.loss!r}"
        )
