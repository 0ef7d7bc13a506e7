"""Random cases and their float64 oracle. The rule that judges an implementation is part of the
package: `pre_kernels/check/rule.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pre_kernels import reference
from pre_kernels.check.rule import LEAVES, Case, Comparison, judge, judge_errors, ramp, run

from . import oracle_wide

# Tests import the names of the rule from this module.
__all__ = ["LEAVES", "Case", "Comparison", "judge", "judge_errors", "ramp", "run"]

HALF = (torch.float16, torch.bfloat16)


def make(
    seed: int,
    *,
    leading: tuple[int, ...] = (3, 17),
    d: int = 24,
    m: int = 40,
    z: int = 24,
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
    anchor, weight: "leading" | "compact"; extra keywords are options of the loss, or fields of
    `Case`.
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

    tensors = {
        "hidden": hidden,
        "anchor": randn(n, z) if anchor == "compact" else randn(*leading, z),
        "w1": randn(m, d) / math.sqrt(d),
        "b1": randn(m) * 0.2 if bias[0] else None,
        "w2": randn(z, m) / math.sqrt(m),
        "b2": randn(z) * 0.2 if bias[1] else None,
    }
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
    x = t["hidden"].reshape(-1, t["hidden"].shape[-1])[index]
    act = reference.ACTIVATIONS[case.options.get("activation", "gelu")]
    z = torch.nn.functional.linear(x, t["w1"], t["b1"]).requires_grad_()
    g = act(z)
    (slope,) = torch.autograd.grad(g.sum(), z)
    p = torch.nn.functional.linear(g.detach(), t["w2"], t["b2"]).requires_grad_()
    a = t["anchor"]
    a = a.reshape(-1, a.shape[-1])[index] if a.shape[:-1] == t["hidden"].shape[:-1] else a
    rows = reference.ROW_LOSSES[case.options.get("loss", "cosine")](p, a)
    weight = (
        torch.ones_like(rows) if not losses.numel() else (losses / rows.detach()).nan_to_num(0.0)
    )
    (dp,) = torch.autograd.grad((rows * weight).sum() * factor * case.upstream, p)
    dp = dp.abs()
    dz = (dp @ t["w2"].abs()) * slope.abs()
    sums = {
        "loss": losses.abs().sum() * factor if reduced.dim() == 0 else losses.abs(),
        "hidden": dz @ t["w1"].abs(),
        "w1": dz.t() @ x.abs(),
        "b1": dz.sum(0),
        "w2": dp.t() @ g.abs(),
        "b2": dp.sum(0),
    }
    return {name: value.max().item() if value.numel() else 0.0 for name, value in sums.items()} | {
        "N": len(index)
    }


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
