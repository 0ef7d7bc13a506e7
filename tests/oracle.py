"""Random cases, the float64 oracle, and the rule by which an implementation's error is judged against eager's."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pre_kernels import reference

LEAVES = ("hidden", "w1", "b1", "w2", "b2")
HALF = (torch.float16, torch.bfloat16)


@dataclass
class Case:
    """The tensors and keywords of one call; `autocast` is the dtype to run it under."""

    tensors: dict[str, Tensor | None]
    rows: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    frozen: tuple[str, ...] = ()
    upstream: float = 1.0

    @property
    def product_dtype(self) -> torch.dtype:
        return self.autocast or self.tensors["hidden"].dtype


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
    share: float = 0.7,
    **case: Any,
) -> Case:
    """rows: "mask" | "index32" | "index64" | "all"; anchor, weight: "leading" | "compact"; extra keywords are options
    of the loss, or fields of `Case`."""
    g = torch.Generator().manual_seed(seed)
    total = math.prod(leading)

    def randn(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=g)
        return x.to(dtype).to(device)

    hidden = randn(*leading, d) * scale
    if not contiguous:
        hidden = hidden.transpose(0, -1).contiguous().transpose(0, -1)
    mask = torch.rand(leading, generator=g) < share
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


def run(function: Any, case: Case, dtype: torch.dtype | None = None, **extra: Any) -> dict[str, Tensor]:
    """Loss and gradients of `function`, the inputs cast to `dtype` if given (float64: the oracle)."""
    tensors = {
        name: None if x is None else (x.detach() if dtype is None else x.detach().to(dtype))
        for name, x in case.tensors.items()
    }
    leaves = {}
    for name in LEAVES:
        if tensors[name] is not None and name not in case.frozen:
            leaves[name] = tensors[name] = tensors[name].requires_grad_()
    options = dict(case.options)
    if dtype is not None and options.get("row_weight") is not None:
        options["row_weight"] = options["row_weight"].to(dtype)
    device = tensors["hidden"].device.type
    autocast = contextlib.nullcontext() if dtype or not case.autocast else torch.autocast(device, case.autocast)
    with autocast:
        loss = function(**tensors, rows=case.rows, **options, **extra)
    out = {"loss": loss.detach()}
    if leaves:
        # one that differs from row to row where there is one for each
        factor = ramp(loss.numel()).to(loss.device) if loss.dim() else 1.0 + 0 * loss.detach()
        upstream = (case.upstream * factor).to(loss.dtype)
        grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            assert grad.dtype == leaf.dtype, f"gradient of {name} came in {grad.dtype}, not in {leaf.dtype}"
            assert grad.shape == leaf.shape
            out[name] = grad
    return out


def ramp(rows: int) -> Tensor:
    """(rows,) float64 factors of the upstream gradient of `reduction="none"`."""
    return torch.linspace(0.5, 1.5, rows, dtype=torch.float64)


def selected(case: Case) -> Tensor:
    """(N,) flat rows in selection order."""
    if case.rows is None:
        return torch.arange(case.tensors["hidden"][..., 0].numel(), device=case.tensors["hidden"].device)
    return case.rows.reshape(-1).nonzero().squeeze(1) if case.rows.dtype == torch.bool else case.rows.long()


def eager(**arguments: Any) -> Tensor:
    """The reference on contiguous tensors: strides change the order in which the vendor's products add up, and at small
    widths their error by a factor of two, but not what they compute."""
    return reference.pre_loss(**{k: x.contiguous() if isinstance(x, Tensor) else x for k, x in arguments.items()})


def scales(case: Case) -> dict[str, float]:
    """What the sums in the loss and in each gradient would be without cancellation, in float64: the scale on which
    rounding acts. It judges scalars, and tensors of so few independent elements that eager's own error is luck."""
    t = {name: None if x is None else x.detach().double() for name, x in case.tensors.items()}
    no_reduction = {k: v for k, v in case.options.items() if k not in ("reduction", "normalizer")}
    probe = Case(t, case.rows, {**no_reduction, "reduction": "none"})
    losses = run(reference.pre_loss, probe, torch.float64)["loss"]
    reduced = run(reference.pre_loss, case, torch.float64)["loss"]
    # the factor that the reduction puts on each row
    factor = abs((reduced.sum() / losses.sum()).item()) if losses.numel() and losses.sum() else 1.0

    index = selected(case)
    x = t["hidden"].reshape(-1, t["hidden"].shape[-1])[index]
    act = reference.ACTIVATIONS[case.options.get("activation", "gelu")]
    z = torch.nn.functional.linear(x, t["w1"], t["b1"]).requires_grad_()
    g = act(z)
    (slope,) = torch.autograd.grad(g.sum(), z)
    p = torch.nn.functional.linear(g.detach(), t["w2"], t["b2"]).requires_grad_()
    a = t["anchor"]
    a = a.reshape(-1, a.shape[-1])[index] if a.shape[:-1] == t["hidden"].shape[:-1] else a
    rows = reference.ROW_LOSSES[case.options.get("loss", "cosine")](p, a)
    weight = torch.ones_like(rows) if not losses.numel() else (losses / rows.detach()).nan_to_num(0.0)
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
    return {name: value.max().item() if value.numel() else 0.0 for name, value in sums.items()} | {"N": len(index)}


class Comparison(NamedTuple):
    """One tensor of a call, and what `judge` wants to know of it."""

    name: str
    ours: Tensor
    eager: Tensor
    oracle: Tensor
    eps: float
    few: float | None
    rest: Tensor | float = 0.0  # of an oracle that is wider than a tensor: to be added to it

    def errors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ours, eager's, and what they are of: float64, flat, where eager is finite."""
        finite = self.eager.isfinite()
        rest = self.rest[finite] if isinstance(self.rest, Tensor) else self.rest
        ours, eager, oracle = (x.double()[finite] for x in (self.ours, self.eager, self.oracle))
        return ours - oracle - rest, eager - oracle - rest, oracle


def judge(one: Comparison) -> None:
    """The error rule, of a call's tensor."""
    name, ours, eager, oracle, eps, few, _ = one
    assert ours.shape == oracle.shape, f"{name}: shape {tuple(ours.shape)}, want {tuple(oracle.shape)}"
    same = torch.equal(ours.isfinite(), eager.isfinite())
    assert same, f"{name}: not finite where eager is, or finite where eager is not"
    judge_errors(name, *one.errors(), eps, few)


def judge_errors(name: str, ours: Tensor, eager: Tensor, oracle: Tensor, eps: float, few: float | None) -> None:
    """The error rule: for many elements, an RMS error of at most 1.1 × eager's and half an eps of the RMS, and twice
    eager's largest; for a few, at most eager's and 2 eps of their scale `few` (2 eps alone are too little for eager
    itself: the scale knows nothing of cancellation inside a row)."""
    if ours.numel() == 0:
        return
    largest, baseline = ours.abs().max().item(), eager.abs().max().item()
    if few is None:
        rms = [x.square().mean().sqrt().item() for x in (ours, eager, oracle)]
        bound = 1.1 * rms[1] + 0.5 * eps * rms[2]
        assert rms[0] <= bound, f"{name}: rms error {rms[0]:.3e} > {bound:.3e} (eager {rms[1]:.3e})"
        bound = 2 * baseline + eps * oracle.abs().max().item()
    else:
        bound = baseline + 2 * eps * few
    assert largest <= bound, f"{name}: max error {largest:.3e} > {bound:.3e} (eager {baseline:.3e})"


def exact(case: Case) -> dict[str, tuple[Tensor, Tensor | float]]:
    """In float64, or of a float64 case in long doubles, if there are any: the oracle and its `rest`."""
    if case.product_dtype == torch.float64:
        import oracle_wide

        if oracle_wide.AVAILABLE:
            return oracle_wide.run(case)
    return {name: (value, 0.0) for name, value in run(reference.pre_loss, case, torch.float64).items()}


def comparisons(function: Any, case: Case, **extra: Any) -> list[Comparison]:
    """The loss and every gradient of `function`, beside eager's in the same dtype and the oracle's."""
    ours = run(function, case, **extra)
    compared, oracle = run(eager, case), exact(case)
    assert ours["loss"].dtype == torch.promote_types(case.product_dtype, torch.float32)
    scale, eps = scales(case), torch.finfo(case.product_dtype).eps
    # the elements of a weight's gradient from few rows are no independent samples: their RMS is luck too
    few = {name: value.numel() < 64 or scale["N"] < 8 for name, value in ours.items()}
    return [
        Comparison(
            name, value, compared[name], oracle[name][0], eps, scale[name] if few[name] else None, oracle[name][1]
        )
        for name, value in ours.items()
    ]


def compare(function: Any, case: Case, **extra: Any) -> dict[str, Tensor]:
    """Judge `function` on `case`: the loss and every gradient against float64, with eager in the same dtype."""
    compared = comparisons(function, case, **extra)
    for one in compared:
        judge(one)
    return {one.name: one.ours for one in compared}
