"""The calls that are measured: their sizes and inputs, one step of each, and the lower bounds on
time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pre_kernels.fused.ops import steps_of
from pre_kernels.fused.products import fastest_dtype
from pre_kernels.fused.steps_torch import IN_CACHE
from pre_kernels.problem import Options, Problem

from . import DTYPES as NAMES
from .rule import LEAVES, MORE_LEAVES, Case

DTYPES = dict(zip(NAMES, (torch.bfloat16, torch.float16, torch.float32), strict=True))
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `tokens` tokens, of which `visual` consecutive ones are visual; widths d
    → m → z, of three layers d → m → m → z. `frozen`: without gradients of the parameters."""

    name: str
    batch: int
    tokens: int
    visual: int
    d: int
    m: int
    z: int
    what: str
    frozen: bool = False
    depth: int = 2
    norm: str | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.d, *[self.m] * (self.depth - 1), self.z)

    @property
    def weights(self) -> int:
        """The elements of all weights."""
        return sum(map(math.prod, pairwise(self.widths)))

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def selected(self) -> int:
        return self.batch * self.visual

    @property
    def flop(self) -> int:
        """The floating-point operations of the products: three with each weight, of which one is
        its gradient."""
        return (4 if self.frozen else 6) * self.selected * self.weights

    @property
    def size(self) -> str:
        return f"{self.selected:,} of {self.rows:,} · {'→'.join(map(str, self.widths))}"


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
    tensors: dict[str, Tensor | None] = {
        "hidden": randn(shape.batch, shape.tokens, shape.d),
        "anchor": randn(shape.batch, shape.tokens, shape.z),
        "w2": None,
        "b2": None,
    }
    for i, (columns, width) in enumerate(pairwise(shape.widths), 1):
        tensors[f"w{i}"] = randn(width, columns) / math.sqrt(columns)
        tensors[f"b{i}"] = randn(width) * 0.2
    if shape.norm is not None:
        tensors["norm_weight"] = 1 + 0.3 * randn(shape.d)
    options = {} if shape.norm is None else {"norm": shape.norm}
    selection = mask if rows == "mask" else mask.reshape(-1).nonzero().squeeze(1)
    frozen = (*LEAVES[1:], *MORE_LEAVES) if shape.frozen else ()
    return Case(tensors, selection, options, frozen=frozen, upstream=0.37)


def step(function: Callable[..., Tensor], case: Case) -> Step:
    """Return one forward and backward of `function` on `case`, which computes every gradient that
    is not frozen for an upstream gradient other than 1."""
    trained = [name for name in (*LEAVES, *MORE_LEAVES) if name not in case.frozen]
    tensors = {
        name: None if x is None else x.detach().requires_grad_(name in trained)
        for name, x in case.tensors.items()
    }
    leaves = [x for name in trained if (x := tensors.get(name)) is not None]
    dtype = torch.promote_types(case.product_dtype, torch.float32)
    upstream = torch.full((), case.upstream, dtype=dtype, device=leaves[0].device)

    def run() -> tuple[Tensor, ...]:
        loss = function(**tensors, rows=case.rows, **case.options)
        return torch.autograd.grad(loss, leaves, upstream)

    return run


def floor(case: Case) -> Step:
    """Return the lower bound: the matmuls that no implementation avoids, three for each weight, or
    two if it is frozen, on contiguous inputs, with outputs allocated beforehand."""
    weights = [w for i in (1, 2, 3) if (w := case.tensors.get(f"w{i}")) is not None]
    rows = case.rows
    assert rows is not None
    x, dp = (case.tensors[name].flatten(0, -2)[rows.flatten()] for name in ("hidden", "anchor"))
    inputs, outputs = [x], []
    for w in weights:
        outputs.append(inputs[-1] @ w.t())
        inputs.append(torch.nn.functional.gelu(outputs[-1]))
    dx, dws = torch.empty_like(x), [torch.empty_like(w) for w in weights]

    def run() -> tuple[Tensor, ...]:
        for i, w in enumerate(weights):
            torch.mm(inputs[i], w.t(), out=outputs[i])
        dy = dp
        for i, w in reversed([*enumerate(weights)]):
            if not case.frozen:
                torch.mm(dy.t(), inputs[i], out=dws[i])
            dy = torch.mm(dy, w, out=outputs[i - 1] if i else dx)
        return dx, *dws

    return run


def formula(shape: Shape, dtype: torch.dtype, impl: str, device: torch.device) -> int:
    """Return the designed peak in bytes, beyond the gradients returned.

    It is the workspace, a compact dH, and float32 sums of dW if there are several chunks. The
    products of a single chunk, and float32 sums of float32 weights, are themselves returned. With
    "torch" dH is returned as well, except for float16, and half-precision weights may be copied to
    float32.
    """
    d, z, n = shape.d, shape.z, shape.selected
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
        norm=shape.norm,
    )
    like = torch.empty((), dtype=dtype, device="cpu" if device.type == "cpu" else "meta")
    hidden, anchor, w1, *more = (
        like.expand(size)
        for size in ((shape.rows, d), (n, z), *[(b, a) for a, b in pairwise(shape.widths)])
    )
    w2, w3 = (*more, None, None)[:2]
    rows = like.long().expand(n)
    given: dict[str, Any] = dict.fromkeys(Problem._fields)
    given.update(hidden=hidden, w1=w1, w2=w2, w3=w3, anchor=anchor, rows=rows, options=options)
    problem = Problem(**given)
    layout = _steps(impl).layout(problem)
    weights = 0 if shape.frozen else 4 * shape.weights
    several: bool = n > layout.rows and dtype != torch.float32
    if impl != "torch":
        return workspace(impl, device, products) + n * d * dtype.itemsize + several * weights
    columns = d + 2 * sum(shape.widths[1:-1]) + z
    chunk: int = _steps(impl).cut(problem, layout, n) * columns * products.itemsize
    if device.type == "cpu":
        # The passes of the row loss and of the norm keep these bytes in the cache.
        chunk += (3 if shape.norm is None else 6) * IN_CACHE
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
        + shape.selected * sum(shape.widths[1:-1])
        + shape.m * max(shape.widths) * (shape.depth - 1)
    )
    return 6 * elements * dtype.itemsize + workspace
