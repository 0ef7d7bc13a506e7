"""Random cases and their float64 oracle. The rule that judges an implementation is part of the
package: `pre_kernels/check/rule.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pre_kernels import reference
from pre_kernels.check.rule import (
    LEAVES,
    MORE_LEAVES,
    Case,
    Comparison,
    judge,
    judge_errors,
    ramp,
    run,
)

from . import oracle_wide

# Tests import the names of the rule from this module.
__all__ = ["LEAVES", "MORE_LEAVES", "Case", "Comparison", "judge", "judge_errors", "ramp", "run"]

HALF = (torch.float16, torch.bfloat16)


def make(
    seed: int,
    *,
    leading: tuple[int, ...] = (3, 17),
    d: int = 24,
    m: int = 40,
    z: int = 24,
    depth: int = 2,
    norm: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rows: str = "mask",
    anchor: str = "leading",
    weight: str | None = None,
    bias: tuple[bool, bool] = (True, True),
    contiguous: bool = True,
    scale: float = 1.0,
    selected: float = 0.7,
    **case: Any,
) -> Case:
    """A random case.

    rows: "mask" | "index32" | "index64" | "all"; selected: the expected fraction of selected rows;
    bias: of the inner layers, of the last one; anchor, weight: "leading" | "compact"; extra
    keywords are options of the loss, or fields of `Case`.
    """
    g = torch.Generator().manual_seed(seed)
    total = math.prod(leading)

    def randn(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=g)
        return x.to(dtype).to(device)

    hidden = randn(*leading, d) * scale
    if not contiguous:
        hidden = hidden.transpose(0, -1).contiguous().transpose(0, -1)
    mask = torch.rand(leading, generator=g) < selected
    index = torch.randperm(total, generator=g)[: int(mask.sum())]
    selection = {"mask": mask, "index32": index.int(), "index64": index, "all": None}[rows]
    n = total if rows == "all" else int(mask.sum())

    tensors: dict[str, Tensor | None] = {
        "hidden": hidden,
        "anchor": randn(n, z) if anchor == "compact" else randn(*leading, z),
        "w2": None,
        "b2": None,
    }
    widths = (d, *(m, m + 3)[: depth - 1], z)
    for layer in range(1, depth + 1):
        width, columns = widths[layer], widths[layer - 1]
        tensors[f"w{layer}"] = randn(width, columns) / math.sqrt(columns)
        biased = bias[layer == depth]
        tensors[f"b{layer}"] = randn(width) * 0.2 if biased else None
    if norm is not None:
        case["norm"] = norm
        tensors["norm_weight"] = 1 + 0.3 * randn(d)
    if norm == "layer":
        tensors["norm_bias"] = 0.2 * randn(d)
    fields = {name: case.pop(name) for name in ("autocast", "frozen", "upstream") if name in case}
    if weight is not None:
        shape = (n,) if weight == "compact" else leading
        case["row_weight"] = (0.1 + torch.rand(shape, generator=g)).to(device)
    return Case(tensors, None if selection is None else selection.to(device), case, **fields)


def eager(**arguments: Any) -> Tensor:
    """The reference on contiguous tensors. Other strides change the order in which the vendor's
    matmuls sum, and at small widths that changes their error by a factor of two."""
    return reference.pre_loss(
        **{k: x.contiguous() if isinstance(x, Tensor) else x for k, x in arguments.items()}
    )


def scales(case: Case) -> dict[str, float]:
    """The size that the sums in the loss and in each gradient would have without cancellation, in
    float64: the scale on which rounding acts. It is used to judge scalars, and tensors with so few
    independent elements that eager's own error is luck."""
    t = {name: None if x is None else x.detach().double() for name, x in case.tensors.items()}
    no_reduction = {k: v for k, v in case.options.items() if k not in ("reduction", "normalizer")}
    probe = Case(t, case.rows, {**no_reduction, "reduction": "none"})
    losses = run(reference.pre_loss, probe, torch.float64)["loss"]
    reduced = run(reference.pre_loss, case, torch.float64)["loss"]
    # The reduction multiplies each row by this factor.
    factor = abs((reduced.sum() / losses.sum()).item()) if losses.numel() and losses.sum() else 1.0

    index = oracle_wide.selected(case)
    rows = t["hidden"].reshape(-1, t["hidden"].shape[-1])[index]
    norm = case.options.get("norm")
    eps = case.options.get("norm_eps", 1e-5)
    x = rows
    if norm is not None:
        x = reference.NORMS[norm](rows, None, None, eps)
    unit = x
    x = x if t.get("norm_weight") is None else x * t["norm_weight"]
    x = x if t.get("norm_bias") is None else x + t["norm_bias"]
    act = reference.ACTIVATIONS[case.options.get("activation", "gelu")]
    inputs, slopes = [x], []
    layers = [i for i in (1, 2, 3) if t.get(f"w{i}") is not None]
    for i in layers:
        y = torch.nn.functional.linear(inputs[-1], t[f"w{i}"], t[f"b{i}"]).requires_grad_()
        g = act(y)
        slopes += torch.autograd.grad(g.sum(), y)
        inputs.append(g.detach())
    p = y
    a = t["anchor"]
    a = a.reshape(-1, a.shape[-1])[index] if a.shape[:-1] == t["hidden"].shape[:-1] else a
    loss = case.options.get("loss", "cosine")
    if loss == "gram":
        own = reference.gram(p, a, _images(case, index))
    else:
        own = reference.ROW_LOSSES[loss](p, a)
    weight = torch.ones_like(own) if not losses.numel() else (losses / own.detach()).nan_to_num(0.0)
    (dp,) = torch.autograd.grad((own * weight).sum() * factor * case.upstream, p)
    sums = {"loss": losses.abs().sum() * factor if reduced.dim() == 0 else losses.abs()}
    dx = dp.abs()
    for i in reversed(layers):
        dy = dx if i == layers[-1] else dx * slopes[i - 1].abs()
        sums[f"w{i}"] = dy.t() @ inputs[i - 1].abs()
        sums[f"b{i}"] = dy.sum(0)
        dx = dy @ t[f"w{i}"].abs()
    if norm is not None:
        sums["norm_weight"] = (dx * unit.abs()).sum(0)
        sums["norm_bias"] = dx.sum(0)
        dx = dx if t.get("norm_weight") is None else dx * t["norm_weight"].abs()
        centred = rows - rows.mean(1, keepdim=True) if norm == "layer" else rows
        inverse = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
        along = (dx * unit.abs()).mean(1, keepdim=True)
        dx = (dx + dx.mean(1, keepdim=True) + unit.abs() * along) * inverse
    sums["hidden"] = dx
    return {name: value.max().item() if value.numel() else 0.0 for name, value in sums.items()} | {
        "N": len(index)
    }


def _images(case: Case, index: Tensor) -> Tensor:
    """(N,) numbers of the images of the selected rows."""
    images = case.options["images"]
    if isinstance(images, str):
        return torch.zeros_like(index)
    return images if images.shape == index.shape else images.reshape(-1)[index]


def exact(case: Case) -> dict[str, tuple[Tensor, Tensor | float]]:
    """The oracle and its `rest`: in float64, or in long doubles for a float64 case, if this machine
    has them."""
    if case.product_dtype == torch.float64 and oracle_wide.AVAILABLE:
        return oracle_wide.run(case)
    return {
        name: (value, 0.0) for name, value in run(reference.pre_loss, case, torch.float64).items()
    }


def comparisons(function: Any, case: Case, **extra: Any) -> list[Comparison]:
    """The loss and every gradient of `function`, each with eager's in the same dtype and the
    oracle's."""
    ours = run(function, case, **extra)
    compared = run(eager, case)
    oracle = exact(case)
    assert ours["loss"].dtype == torch.promote_types(case.product_dtype, torch.float32)
    scale = scales(case)
    eps = torch.finfo(case.product_dtype).eps
    # With few rows the elements of a weight's gradient are not independent samples, so their RMS
    # is luck too.
    few = {name: value.numel() < 64 or scale["N"] < 8 for name, value in ours.items()}
    return [
        Comparison(
            name,
            value,
            compared[name],
            oracle[name][0],
            eps,
            scale[name] if few[name] else None,
            oracle[name][1],
        )
        for name, value in ours.items()
    ]


def compare(function: Any, case: Case, **extra: Any) -> dict[str, Tensor]:
    """Judge the loss and every gradient of `function` on `case`: their errors against float64 are
    compared with those of eager in the same dtype."""
    compared = comparisons(function, case, **extra)
    for comparison in compared:
        judge(comparison)
    return {comparison.name: comparison.ours for comparison in compared}
