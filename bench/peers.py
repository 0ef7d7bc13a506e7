"""Who is measured: a table of peers, each one training step's loss and gradients on the same inputs.

A new peer is a row: a loss function of the signature of `reference.pre_loss`, and why it may be unavailable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pre_kernels import fused_pre_loss, reference
from pre_kernels.loss import unavailable

from .check import oracle

Step = Callable[[], tuple[Tensor, ...]]


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _triton_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "no GPU here, and Triton's interpreter is never timed"
    return unavailable(device, dtype)


def _compiled() -> Callable[..., Tensor]:
    torch.compiler.reset()  # else a second shape would be compiled for dynamic sizes
    return torch.compile(reference.pre_loss)


@dataclass(frozen=True)
class Peer:
    name: str
    what: str
    build: Callable[[], Callable[..., Tensor]] | None  # makes the loss function; None: the floor, which has no loss
    missing: Callable[[torch.device, torch.dtype], str | None] = _always
    ours: bool = False  # a failed check of ours fails the run; that of another peer only leaves it out


PEERS = [
    Peer("ours-triton", "fused_pre_loss, impl='triton'", lambda: _ours("triton"), _triton_missing, ours=True),
    Peer("ours-torch", "fused_pre_loss, impl='torch'", lambda: _ours("torch"), ours=True),
    Peer("eager", "reference.pre_loss and autograd", lambda: reference.pre_loss),
    Peer("compile", "the same under torch.compile, default mode", _compiled),
    Peer("floor", "the six bare products, on rows already gathered", None),
]
BY_NAME = {peer.name: peer for peer in PEERS}


def _ours(impl: str, **options: Any) -> Callable[..., Tensor]:
    return partial(fused_pre_loss, impl=impl, **options)


def step(function: Callable[..., Tensor], case: oracle.Case) -> Step:
    """One forward and backward of `function` on `case`, with every gradient wanted and an upstream other than 1."""
    tensors = {name: x.detach().requires_grad_(name in oracle.LEAVES) for name, x in case.tensors.items()}
    leaves = [tensors[name] for name in oracle.LEAVES]
    dtype = torch.promote_types(case.product_dtype, torch.float32)
    upstream = torch.full((), case.upstream, dtype=dtype, device=leaves[0].device)

    def run() -> tuple[Tensor, ...]:
        loss = function(**tensors, rows=case.rows, **case.options)
        return torch.autograd.grad(loss, leaves, upstream)

    return run


def floor(case: oracle.Case) -> Step:
    """The six products that no implementation avoids: contiguous inputs, outputs allocated beforehand."""
    w1, w2 = case.tensors["w1"], case.tensors["w2"]
    rows = case.rows.reshape(-1)
    x, dp = (case.tensors[name].reshape(rows.numel(), -1)[rows] for name in ("hidden", "anchor"))
    z = x @ w1.t()
    g, p, dx = torch.nn.functional.gelu(z), torch.empty_like(dp), torch.empty_like(x)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)

    def run() -> tuple[Tensor, ...]:
        torch.mm(x, w1.t(), out=z)
        torch.mm(g, w2.t(), out=p)
        torch.mm(dp.t(), g, out=dw2)
        torch.mm(dp, w2, out=z)
        torch.mm(z.t(), x, out=dw1)
        torch.mm(z, w1, out=dx)
        return dx, dw1, dw2

    return run
