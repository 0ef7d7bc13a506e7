"""Fuzzed cases. A `Spec` describes a case completely: the case is built from the seed in it.
draw.py draws specs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from pre_kernels import reference

from .. import oracle


@dataclasses.dataclass(frozen=True)
class Spec:
    """Arguments that reproduce a case: `run(Spec(...))` of verdicts.py, or `python -m bench.fuzz
    --case '{...}'`."""

    impl: str = "torch"
    seed: int = 0
    dtype: str = "float32"  # | "bfloat16" | "float16" | "float64"
    autocast: str | None = None
    leading: tuple[int, ...] = (7,)
    d: int = 3
    m: int = 5
    z: int = 3
    depth: int = 2  # Of three layers the second has m + 3 columns.
    norm: str | None = None  # | "layer" | "rms"
    affine: bool = True  # whether the norm has a weight, and "layer" a bias
    loss: str = "cosine"
    activation: str = "gelu"
    reduction: str = "mean"
    normalizer: float | None = None
    normalizer_tensor: bool = False
    bias: tuple[bool, bool] = (True, True)  # The inner layers' and the last one's.
    rows: str = "all"  # | "mask" | "index32" | "index64"
    pattern: str = "random"  # | "all" | "one" | "empty" | "alternating" | "runs"
    anchor_compact: bool = False
    anchor_dtype: str | None = None  # None = hidden's
    anchor: str = "random"  # | "parallel" | "opposite" to the predictions
    noise: float = 0.0  # relative, added to parallel and opposite anchors
    weight: str | None = None  # "leading" | "compact"
    scale: int = 0  # The scales are exponents of ten; this one is for hidden.
    scale_w2: int = 0  # for weight and bias of the last layer, at any depth
    scale_anchor: int = 0
    outliers: str = "none"  # | "tokens" | "channels"
    zero_rows: bool = False
    constant: bool = False  # The last weight is 0: every prediction is the last bias.
    layout: str = "contiguous"  # | "transposed" | "strided" | "expanded"
    upstream: float = 1.0
    frozen: tuple[str, ...] = ()
    workspace: int | None = None
    capacity: int | None = None  # how many rows more than the mask selects
    # the half-precision units that this CPU is taken to have, as products.HALF_UNITS
    units: str | None = None

    @property
    def product_dtype(self) -> str:
        return self.autocast or self.dtype

    @classmethod
    def of(cls, given: dict[str, Any]) -> Spec:
        """A spec from JSON, which has lists instead of tuples."""
        return cls(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in given.items()
            }
        )


def build(spec: Spec, device: torch.device | str = "cpu") -> tuple[oracle.Case, dict[str, Any]]:
    """The case, and the keywords that only `fused_pre_loss` takes."""
    g = torch.Generator().manual_seed(spec.seed)
    dtype = getattr(torch, spec.dtype)
    total = math.prod(spec.leading)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def cast(x: Tensor, to: torch.dtype = dtype) -> Tensor:
        return x.clamp(torch.finfo(to).min, torch.finfo(to).max).to(to)

    mask = _mask(spec.pattern, total, g)
    n = total if spec.rows == "all" else int(mask.sum())
    selected = mask.nonzero().squeeze(1)[torch.randperm(int(mask.sum()), generator=g)]
    rows = {
        "all": None,
        "mask": mask.reshape(spec.leading),
        "index32": selected.int(),
        "index64": selected,
    }[spec.rows]
    order = (
        mask.nonzero().squeeze(1)
        if spec.rows == "mask"
        else selected
        if spec.rows != "all"
        else torch.arange(total)
    )

    tensors: dict[str, Tensor | None] = {
        "hidden": cast(_hidden(spec, randn, g)),
        "w2": None,
        "b2": None,
    }
    widths = (spec.d, *(spec.m, spec.m + 3)[: spec.depth - 1], spec.z)
    for i in range(1, spec.depth + 1):
        last = i == spec.depth
        size = 10.0**spec.scale_w2 if last else 1.0
        weight = randn(widths[i], widths[i - 1]) / math.sqrt(widths[i - 1])
        tensors[f"w{i}"] = cast(weight * (0.0 if last and spec.constant else size))
        biased = spec.bias[last]
        tensors[f"b{i}"] = cast(randn(widths[i]) * 0.2 * size) if biased else None
    if spec.norm is not None and spec.affine:
        tensors["norm_weight"] = cast(1 + 0.3 * randn(spec.d))
        if spec.norm == "layer":
            tensors["norm_bias"] = cast(0.2 * randn(spec.d))
    anchor = randn(total, spec.z)
    if spec.anchor != "random":
        p = _predictions(spec, tensors)
        p = p / p.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        anchor = (p + spec.noise * anchor) * (1 if spec.anchor == "parallel" else -1)
    anchor = anchor * 10.0**spec.scale_anchor
    if spec.zero_rows:
        anchor[torch.rand(total, generator=g) < 0.1] = 0
    anchor = anchor[order] if spec.anchor_compact else anchor.reshape(*spec.leading, spec.z)
    tensors["anchor"] = _laid_out(
        spec.layout, cast(anchor, getattr(torch, spec.anchor_dtype or spec.dtype))
    )
    for name, x in tensors.items():
        if name != "anchor" and x is not None:
            tensors[name] = _laid_out(spec.layout, x)

    options: dict[str, Any] = {
        "loss": spec.loss,
        "activation": spec.activation,
        "reduction": spec.reduction,
    }
    if spec.norm is not None:
        options["norm"] = spec.norm
    if spec.normalizer is not None:
        options["normalizer"] = (
            torch.tensor(spec.normalizer) if spec.normalizer_tensor else spec.normalizer
        )
    if spec.weight is not None:
        shape = (n,) if spec.weight == "compact" else spec.leading
        options["row_weight"] = (0.1 + torch.rand(shape, generator=g)).to(device)
    autocast = None if spec.autocast is None else getattr(torch, spec.autocast)
    on_device = {name: None if x is None else x.to(device) for name, x in tensors.items()}
    rows = None if rows is None else rows.to(device)
    extra: dict[str, Any] = {"workspace": spec.workspace}
    if spec.capacity is not None:
        extra["capacity"] = max(1, n + spec.capacity)
    return oracle.Case(on_device, rows, options, autocast, spec.frozen, spec.upstream), extra


def _mask(pattern: str, total: int, g: torch.Generator) -> Tensor:
    """(total,) bool"""
    at = torch.arange(total)
    if pattern == "random":
        return torch.rand(total, generator=g) < 0.6
    if pattern == "one":
        return at == int(torch.randint(total, (1,), generator=g))
    if pattern == "runs":  # like images between text
        return (at // 11) % 2 == 1
    return {"all": at >= 0, "empty": at < 0, "alternating": at % 2 == 1}[pattern]


def _hidden(spec: Spec, randn: Any, g: torch.Generator) -> Tensor:
    hidden = randn(math.prod(spec.leading), spec.d)
    # Equal along the first dimension: `_laid_out` makes it a view.
    if spec.layout == "expanded":
        hidden = (
            hidden.reshape(*spec.leading, spec.d)[:1]
            .expand(*spec.leading, spec.d)
            .reshape(-1, spec.d)
        )
    channels = torch.randint(spec.d, (2,), generator=g)
    if spec.outliers == "tokens":
        # Massive activations: the same few channels of a few tokens, at 1,000 times the rest.
        few = torch.rand(len(hidden), generator=g) < 0.05
        hidden[few.nonzero(), channels] = 1000.0
    elif spec.outliers == "channels":
        hidden[:, channels] *= 30
    if spec.zero_rows:
        hidden[torch.rand(len(hidden), generator=g) < 0.1] = 0
    return (hidden * 10.0**spec.scale).reshape(*spec.leading, spec.d)


def _predictions(spec: Spec, tensors: dict[str, Tensor | None]) -> Tensor:
    """(total, z) in float64"""
    t = {name: None if x is None else x.double() for name, x in tensors.items()}
    x = t["hidden"].reshape(-1, spec.d)
    if spec.norm is not None:
        x = reference.NORMS[spec.norm](x, t.get("norm_weight"), t.get("norm_bias"), 1e-5)
    for i in range(1, spec.depth + 1):
        x = x if i == 1 else reference.ACTIVATIONS[spec.activation](x)
        x = torch.nn.functional.linear(x, t[f"w{i}"], t[f"b{i}"])
    return x


def _laid_out(layout: str, x: Tensor) -> Tensor:
    """The same values with other strides; "expanded" keeps only the first row, and repeats it."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":  # every other element of a larger tensor, NaN between them
        wide = x.new_full((*x.shape, 2), math.nan)
        wide[..., 0] = x
        return wide[..., 0]
    if layout == "expanded" and x.dim() > 2 and x.shape[0]:
        return x[:1].expand(x.shape)
    return x
