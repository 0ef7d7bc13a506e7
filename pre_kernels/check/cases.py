"""The calls that are measured: their sizes and inputs, one step of each, and the lower bounds on
time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pre_kernels.fused.ops import steps_of
from pre_kernels.fused.products import fastest_dtype
from pre_kernels.fused.steps_torch import IN_CACHE
from pre_kernels.problem import Options, Problem

from . import DTYPES as NAMES
from .rule import LEAVES, Case

DTYPES = dict(zip(NAMES, (torch.bfloat16, torch.float16, torch.float32), strict=True))
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `tokens` tokens, of which `visual` consecutive ones are visual; widths d
    → m → z. `frozen`: without gradients of the predictor's parameters."""

    name: str
    batch: int
    tokens: int
    visual: int
    d: int
    m: int
    z: int
    what: str
    frozen: bool = False

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def selected(self) -> int:
        return self.batch * self.visual

    @property
    def flop(self) -> int:
        """The floating-point operations of the six products: two in the forward, four in the
        backward, of which two are gradients of the weights."""
        return (4 if self.frozen else 6) * self.selected * self.m * (self.d + self.z)

    @property
    def size(self) -> str:
        return f"{self.selected:,} of {self.rows:,} · {self.d}→{self.m}→{self.z}"


def case(
    shape: Shape, dtype: torch.dtype, device: torch.device, rows: str = "index", seed: int = 0
) -> Case:
    """Make inputs of a size. The visual tokens follow a short prompt, and the upstream gradient is
    not 1.

    rows: "index" for int64 indices, or "mask" for the same rows as a mask.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    mask = torch.zeros(shape.batch, shape.tokens, dtype=torch.bool, device=device)
    first = min(35, shape.tokens - shape.visual)
    mask[:, first : first + shape.visual] = True
    tensors = {
        "hidden": randn(shape.batch, shape.tokens, shape.d),
        "anchor": randn(shape.batch, shape.tokens, shape.z),
        "w1": randn(shape.m, shape.d) / math.sqrt(shape.d),
        "b1": randn(shape.m) * 0.2,
        "w2": randn(shape.z, shape.m) / math.sqrt(shape.m),
        "b2": randn(shape.z) * 0.2,
    }
    selection = mask if rows == "mask" else mask.reshape(-1).nonzero().squeeze(1)
    frozen = ("w1", "b1", "w2", "b2") if shape.frozen else ()
    return Case(tensors, selection, frozen=frozen, upstream=0.37)


def step(function: Callable[..., Tensor], case: Case) -> Step:
    """Return one forward and backward of `function` on `case`, which computes every gradient that
    is not frozen for an upstream gradient other than 1."""
    trained = [name for name in LEAVES if name not in case.frozen]
    tensors = {
        name: None if x is None else x.detach().requires_grad_(name in trained)
        for name, x in case.tensors.items()
    }
    leaves = [x for name in trained if (x := tensors[name]) is not None]
    dtype = torch.promote_types(case.product_dtype, torch.float32)
    upstream = torch.full((), case.upstream, dtype=dtype, device=leaves[0].device)

    def run() -> tuple[Tensor, ...]:
        loss = function(**tensors, rows=case.rows, **case.options)
        return torch.autograd.grad(loss, leaves, upstream)

    return run


def floor(case: Case) -> Step:
    """Return the lower bound: the six matmuls that no implementation avoids, or four with frozen
    weights, on contiguous inputs, with outputs allocated beforehand."""
    w1 = case.tensors["w1"]
    w2 = case.tensors["w2"]
    rows = case.rows
    assert rows is not None
    x, dp = (case.tensors[name].flatten(0, -2)[rows.flatten()] for name in ("hidden", "anchor"))
    z = x @ w1.t()
    g = torch.nn.functional.gelu(z)
    p = torch.empty_like(dp)
    dx = torch.empty_like(x)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)

    def run() -> tuple[Tensor, ...]:
        torch.mm(x, w1.t(), out=z)
        torch.mm(g, w2.t(), out=p)
        if not case.frozen:
            torch.mm(dp.t(), g, out=dw2)
        torch.mm(dp, w2, out=z)
        if not case.frozen:
            torch.mm(z.t(), x, out=dw1)
        torch.mm(z, w1, out=dx)
        return dx, dw1, dw2

    return run


def formula(shape: Shape, dtype: torch.dtype, impl: str, device: torch.device) -> int:
    """Return the designed peak in bytes, beyond the gradients returned.

    It is the workspace, a compact dH, and float32 sums of dW if there are several chunks. The
    products of a single chunk, and float32 sums of float32 weights, are themselves returned. With
    "torch" dH is returned as well, except for float16, and half-precision weights may be copied to
    float32.
    """
    d, m, z, n = shape.d, shape.m, shape.z, shape.selected
    products = fastest_dtype(dtype, device) if impl == "torch" else dtype
    precision = "fp8" if impl == "fp8" else None
    options = Options(
        loss="cosine",
        activation="gelu",
        reduction="mean",
        dtype=products,
        anchor_compact=True,
        weight_compact=False,
        images_compact=False,
        divisor=None,
        workspace=None,
        capacity=None,
        precision=precision,
    )
    like = torch.empty((), dtype=dtype, device="cpu" if device.type == "cpu" else "meta")
    hidden, anchor, w1, w2 = (
        like.expand(size) for size in ((shape.rows, d), (n, z), (m, d), (z, m))
    )
    rows = like.long().expand(n)
    problem = Problem(
        hidden=hidden,
        w1=w1,
        b1=None,
        w2=w2,
        b2=None,
        w3=None,
        b3=None,
        anchor=anchor,
        rows=rows,
        weight=None,
        images=None,
        normalizer=None,
        options=options,
    )
    layout = _steps(impl).layout(problem)
    weights = 0 if shape.frozen else 4 * m * (d + z)
    several: bool = n > layout.rows and dtype != torch.float32
    if impl != "torch":
        return workspace(impl, device, products) + n * d * dtype.itemsize + several * weights
    chunk: int = _steps(impl).cut(problem, layout, n) * (d + 2 * m + z) * products.itemsize
    if device.type == "cpu":
        # The passes of the row loss keep these bytes in the cache.
        chunk += 3 * IN_CACHE
    kept = shape.rows * d * 4 if layout.spread != dtype else 0
    return chunk + kept + (2 * weights if products != dtype else several * weights)


def _steps(impl: str) -> Any:
    # "fp8" is a precision of "blas".
    return steps_of("blas" if impl == "fp8" else impl)


def workspace(impl: str, device: torch.device, dtype: torch.dtype) -> int:
    """Return the bytes that an implementation takes by default for a chunk's buffers, with products
    in `dtype`."""
    default = _steps(impl).workspace
    size: int = default(device, dtype) if callable(default) else default
    return size


def needed(shape: Shape, dtype: torch.dtype, workspace: int) -> int:
    """Return the bytes for inputs, gradients and what eager keeps between its forward and backward,
    a little more than measured."""
    elements = (
        shape.rows * max(shape.d, shape.z)
        + shape.selected * shape.m
        + shape.m * max(shape.d, shape.z)
    )
    return 6 * elements * dtype.itemsize + workspace
