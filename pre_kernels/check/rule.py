"""The error rule: how far from float64 the loss and gradients of an implementation may be, compared
with eager's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pre_kernels import reference

LEAVES = ("hidden", "w1", "b1", "w2", "b2")
# What a head has in addition that is deeper, or has a norm.
MORE_LEAVES = ("w3", "b3", "norm_weight", "norm_bias")
# A result whose error exceeds this multiple of eager's (by the size of an element in bytes) is
# wrong, not just badly rounded. float32 gets 100, since some implementations add in a poor order.
WRONG = {2: 5.0, 4: 100.0}


@dataclass
class Case:
    """The tensors and keywords of one call. `autocast` is the dtype to run it under."""

    tensors: dict[str, Any]  # by name; None for a bias that is left out
    rows: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    frozen: tuple[str, ...] = ()
    upstream: float = 1.0

    @property
    def product_dtype(self) -> torch.dtype:
        return self.autocast or self.tensors["hidden"].dtype


def run(
    function: Callable[..., Tensor], case: Case, dtype: torch.dtype | None = None, **extra: Any
) -> dict[str, Tensor]:
    """Return loss and gradients of `function`. With `dtype` the inputs are cast to it first
    (float64 is the oracle)."""
    tensors: dict[str, Any] = {
        name: None if x is None else (x.detach() if dtype is None else x.detach().to(dtype))
        for name, x in case.tensors.items()
    }
    leaves = {}
    for name in (*LEAVES, *MORE_LEAVES):
        if tensors.get(name) is not None and name not in case.frozen:
            leaves[name] = tensors[name] = tensors[name].requires_grad_()
    options = dict(case.options)
    if dtype is not None and options.get("row_weight") is not None:
        options["row_weight"] = options["row_weight"].to(dtype)
    device = tensors["hidden"].device.type
    autocast = (
        contextlib.nullcontext()
        if dtype or not case.autocast
        else torch.autocast(device, case.autocast)
    )
    with autocast:
        loss = function(**tensors, rows=case.rows, **options, **extra)
    out = {"loss": loss.detach()}
    if leaves:
        # If each row has a loss, the upstream gradient differs from row to row.
        factor = ramp(loss.numel()).to(loss.device) if loss.dim() else 1.0 + 0 * loss.detach()
        upstream = (case.upstream * factor).to(loss.dtype)
        grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            _require(
                grad.dtype == leaf.dtype,
                f"gradient of {name} came in {grad.dtype}, not in {leaf.dtype}",
            )
            want = f"want {tuple(leaf.shape)}"
            _require(
                grad.shape == leaf.shape, f"gradient of {name}: shape {tuple(grad.shape)}, {want}"
            )
            out[name] = grad
    return out


def ramp(rows: int) -> Tensor:
    """Return (rows,) float64 factors for the upstream gradient of `reduction="none"`."""
    return torch.linspace(0.5, 1.5, rows, dtype=torch.float64)


class Comparison(NamedTuple):
    """One tensor of a call, with everything that `judge` needs to know about it."""

    name: str
    ours: Tensor
    eager: Tensor
    oracle: Tensor
    eps: float
    few: float | None
    # If the oracle is wider than any dtype of a tensor, this has to be added to `oracle`.
    rest: Tensor | float = 0.0

    def overflowed(self) -> Tensor:
        """Return where ours is the infinity that the oracle rounds to."""
        return ~self.ours.isfinite() & (self.ours == self.oracle.to(self.ours.dtype))

    def errors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return our errors, eager's errors and the oracle's values, flat in float64, where eager
        is finite and the expected value is too."""
        finite = self.eager.isfinite() & ~self.overflowed()
        rest = self.rest[finite] if isinstance(self.rest, Tensor) else self.rest
        ours, eager, oracle = (x.double()[finite] for x in (self.ours, self.eager, self.oracle))
        return ours - oracle - rest, eager - oracle - rest, oracle


def judge(comparison: Comparison) -> float:
    """Return how much of the error rule a tensor of a call uses up, at most 1. Raise AssertionError
    beyond that, also under `python -O`."""
    name, ours, eager, oracle, eps, few, _ = comparison
    _require(
        ours.shape == oracle.shape, f"{name}: shape {tuple(ours.shape)}, want {tuple(oracle.shape)}"
    )
    bad = eager.isfinite() & ~ours.isfinite() & ~comparison.overflowed()
    _require(not bad.any(), f"{name}: not finite where eager is")
    _overflow(comparison)
    return judge_errors(name, *comparison.errors(), eps, few)


def _overflow(comparison: Comparison) -> None:
    """Where eager is not finite, require that ours is not finite either, or is close to the
    oracle's value, for which only eager's products were too narrow."""
    name, ours, eager, oracle, eps, *_ = comparison
    where = ours.isfinite() & ~eager.isfinite()
    if where.any():
        error = (ours.double() - oracle)[where].abs().max().item()
        scale = oracle[where].abs().max().item()
        _require(
            error <= 8 * eps * scale,
            f"{name}: finite where eager is not, and off by {error:.3e} of {scale:.3e}",
        )


def judge_errors(
    name: str, ours: Tensor, eager: Tensor, oracle: Tensor, eps: float, few: float | None
) -> float:
    """Apply the error rule to the errors of one tensor.

    Many elements may have an RMS error of at most 1.1 times eager's plus half an eps of the RMS,
    and twice eager's largest error. Few elements may have at most eager's error plus 2 eps of their
    scale `few`. 2 eps by themselves are too little even for eager, because the scale does not show
    cancellation inside a row.
    """
    if ours.numel() == 0:
        return 0.0
    largest = ours.abs().max().item()
    baseline = eager.abs().max().item()
    if few is None:
        rms = [x.square().mean().sqrt().item() for x in (ours, eager, oracle)]
        bounds = [("rms", rms[0], 1.1 * rms[1] + 0.5 * eps * rms[2], rms[1])]
        bounds += [("max", largest, 2 * baseline + eps * oracle.abs().max().item(), baseline)]
    else:
        bounds = [("max", largest, baseline + 2 * eps * few, baseline)]
    for kind, error, bound, of_eager in bounds:
        _require(
            error <= bound, f"{name}: {kind} error {error:.3e} > {bound:.3e} (eager {of_eager:.3e})"
        )
    return max((error / bound if bound else 0.0) for _, error, bound, _ in bounds)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


class Verdict(NamedTuple):
    """The verdict of a `Judge` on a function.

    Attributes:
        failure: how the function broke the rule; None if it did not.
        error_ratio: the largest rms error of the gradients, each ÷ eager's in the same dtype.
        relative: the largest rms error of the gradients, each ÷ that gradient's own rms.
        share: how much of the rule, or of the gate, the worst tensor used up; nan beyond the rule.
        wrong: whether the function is wrong, rather than rounded worse than the rule allows. The
            latter is a result too, and not a reason to leave a baseline out.
    """

    failure: str | None
    error_ratio: float
    relative: float
    share: float
    wrong: bool


class Judge:
    """Hold eager's result and the float64 result of a case. A call judges a function on that
    case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.eager = run(reference.pre_loss, case)
        self.truth = run(reference.pre_loss, case, torch.float64)
        wide: dict[str, Any] = {
            name: None if x is None else x.double() for name, x in case.tensors.items()
        }
        with torch.no_grad():
            losses = reference.pre_loss(
                **wide, rows=case.rows, **case.options | {"reduction": "none"}
            )
        # The rounding of the summed loss acts on this scale.
        self.scale = losses.abs().mean().item()

    def __call__(self, function: Callable[..., Tensor], gate: float | None = None) -> Verdict:
        """Judge by the error rule, or with a `gate` only by that: a bound on the relative rms error
        of each gradient."""
        result = run(function, self.case)
        eps = torch.finfo(self.case.product_dtype).eps
        many = {name: value for name, value in result.items() if value.numel() >= 64}
        ratio = _largest(
            self._rms(name, value) / self._rms(name, self.eager[name])
            for name, value in many.items()
        )
        relative = _largest(
            self._rms(name, value) / _rms(self.truth[name]) for name, value in many.items()
        )
        if gate is not None:
            loss = self._rms("loss", result["loss"]) / self.scale
            share = _largest((relative / gate, loss / gate))
            if share <= 1:
                return Verdict(None, ratio, relative, share, False)
            failure = f"relative error {relative:.3g}, of the loss {loss:.3g} > {gate}"
            return Verdict(failure, ratio, relative, share, True)
        share = 0.0
        try:
            for name, value in result.items():
                few = self.scale if value.numel() < 64 else None
                truth = self.truth[name]
                share = max(
                    share, judge(Comparison(name, value, self.eager[name], truth, eps, few))
                )
        except AssertionError as error:
            wrong = not ratio < WRONG[self.case.product_dtype.itemsize]
            return Verdict(str(error), ratio, relative, math.nan, wrong)
        return Verdict(None, ratio, relative, share, False)

    def _rms(self, name: str, value: Tensor) -> float:
        return _rms(value.double() - self.truth[name])


def _rms(value: Tensor) -> float:
    return value.square().mean().sqrt().item()


def _largest(values: Iterable[float]) -> float:
    """Return the largest value, or nan if any value is nan."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()
