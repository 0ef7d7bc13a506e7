"""The error rule on fuzzed cases, and the verdict where eager's own error is luck.

The rule of oracle.py compares two samples of rounding noise. If a few rows or elements dominate a
tensor, eager's error may be small by chance: eager itself would break the rule against its own
error on another sample. So a tensor that breaks the rule is judged again, by the same rule over an
ensemble: the case and neighbours of it that differ only in the bits that are rounded, all with the
same weight. An implementation that is worse than eager fails this too, which is a violation; one
that passes is counted as "luck".

An overflow in eager is not an error to compare with. If eager is not finite while ours and the
oracle are, or if ours overflows while eager is within 4 eps of the largest number, the comparison
says nothing ("overflow").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from pre_kernels import fused_pre_loss
from pre_kernels.fused import products

from .. import oracle
from .specs import Spec, build

# The last size decides: with that many members an RMS is known to a few percent.
ENSEMBLES = (32, 128, 512, 2048)
WITHIN, OVERFLOW, LUCK, VIOLATION = "within", "overflow", "luck", "violation"


class Outcome(NamedTuple):
    """The verdict on the loss or on a gradient. Errors are RMS, or the largest if there are few
    elements; nan if no element is finite."""

    name: str
    verdict: str
    error: float
    eager: float
    allowed: float  # the error that the rule allows in addition to eager's
    turned: bool  # whether eager breaks the rule when it is compared with ours
    message: str


def run(spec: Spec, device: torch.device | str = "cpu") -> list[Outcome]:
    """The outcome of each tensor of a case."""
    case, extra = build(spec, device)

    def function(**arguments: Any) -> Tensor:
        with mock.patch.object(products, "HALF_UNITS", spec.units):
            return fused_pre_loss(**arguments, **extra, impl=spec.impl)

    ensemble = Ensemble(function, case)
    outcomes = []
    for comparison in oracle.comparisons(function, case):
        verdict = WITHIN
        message = ""
        try:
            oracle.judge(comparison)
        except AssertionError as error:
            spared = _holds(oracle.judge, _without_overflow(comparison))
            verdict = OVERFLOW if spared else LUCK if ensemble.holds(comparison.name) else VIOLATION
            message = str(error)
        turned = not _holds(
            oracle.judge,
            _without_overflow(comparison._replace(ours=comparison.eager, eager=comparison.ours)),
        )
        outcomes.append(Outcome(comparison.name, verdict, *_sizes(comparison), turned, message))
    return outcomes


class Ensemble:
    """A case and its neighbours, computed on first use."""

    def __init__(self, function: Any, case: oracle.Case) -> None:
        self.function, self.case = function, case
        self.members: list[dict[str, oracle.Comparison]] = []

    def member(self, i: int) -> dict[str, oracle.Comparison]:
        """The comparison of each tensor of neighbour `i`; 0 is the case itself."""
        while len(self.members) <= i:
            compared = oracle.comparisons(self.function, neighbour(self.case, len(self.members)))
            self.members.append({one.name: one for one in compared})
        return self.members[i]

    def holds(self, name: str) -> bool:
        """Whether the rule holds over all members together, at any of the ensemble sizes.

        Each member's errors are divided by the size of ours and eager's together, or else the worst
        conditioned member would decide. Therefore the error of the case itself may be at most twice
        the largest of eager's.
        """
        for size in ENSEMBLES:
            members = [_without_overflow(self.member(i)[name]) for i in range(size)]
            if not all(
                torch.equal(comparison.ours.isfinite(), comparison.eager.isfinite())
                for comparison in members
            ):
                return False
            errors = [comparison.errors() for comparison in members]
            norms = [[x.norm().item() for x in member] for member in errors]
            ours, _, exact = norms[0]
            largest = max(eager for _, eager, _ in norms)
            if ours > 2 * largest + members[0].eps * exact:
                continue
            alike = [
                [x / (math.hypot(*size[:2]) or 1.0) for x in member]
                for member, size in zip(errors, norms, strict=True)
            ]
            if _holds(
                oracle.judge_errors,
                name,
                *map(torch.cat, zip(*alike, strict=True)),
                members[0].eps,
                None,
            ):
                return True
        return False


def neighbour(case: oracle.Case, number: int) -> oracle.Case:
    """Neighbour `number` of a case: 0 is the case itself, any other differs from it only in how it
    rounds.

    Inputs differ by up to 2 eps. Row weights (one for all rows, if the case has none), the upstream
    gradient, and each column of the predictions together with that of the anchors differ by a
    factor between ½ and 1: parallel vectors stay parallel, and equal rows stay equal. If rows are
    equal, changing only the last bits is not enough, because the rounding error depends on the
    leading bits too.
    """
    if number == 0:
        return case
    g = torch.Generator().manual_seed(number)
    last = max(i for i in (1, 2, 3) if case.tensors.get(f"w{i}") is not None)
    width = case.tensors[f"w{last}"].shape[0]
    columns = 2 ** -torch.rand(width, generator=g, dtype=torch.float64)
    factors = {f"w{last}": columns[:, None], f"b{last}": columns, "anchor": columns}

    def near(name: str, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype if name == "anchor" else case.product_dtype).eps
        change = (1 + eps * torch.randint(-2, 3, x.shape, generator=g)) * factors.get(name, 1)
        return (x.double() * change.to(x.device)).to(x.dtype)

    tensors = {name: None if x is None else near(name, x) for name, x in case.tensors.items()}
    options = dict(case.options)
    weight = options.get("row_weight")
    factors_of_rows = 2 ** -torch.rand(() if weight is None else weight.shape, generator=g)
    if weight is None:
        weight = torch.ones(case.tensors["hidden"].shape[:-1], device=case.tensors["hidden"].device)
    options["row_weight"] = weight * factors_of_rows.to(weight.device)
    upstream = case.upstream * 2 ** -torch.rand((), generator=g).item()
    return dataclasses.replace(case, tensors=tensors, options=options, upstream=upstream)


def _without_overflow(one: oracle.Comparison) -> oracle.Comparison:
    """Replace both by the oracle where only eager has overflowed, or where only ours has while
    eager is at the very edge."""
    edge = (1 - 4 * one.eps) * torch.finfo(one.ours.dtype).max
    spared = ~one.eager.isfinite() & one.ours.isfinite() & one.oracle.isfinite()
    spared |= ~one.ours.isfinite() & one.eager.isfinite() & (one.eager.abs() >= edge)
    ours, eager = (torch.where(spared, one.oracle, x.double()) for x in (one.ours, one.eager))
    rest = torch.where(spared, 0, one.rest) if isinstance(one.rest, Tensor) else one.rest
    return one._replace(ours=ours, eager=eager, rest=rest)


def _holds(rule: Callable[..., None], *arguments: Any) -> bool:
    try:
        rule(*arguments)
    except AssertionError:
        return False
    return True


def _sizes(comparison: oracle.Comparison) -> tuple[float, float, float]:
    finite = comparison.ours.isfinite()
    rest = comparison.rest[finite] if isinstance(comparison.rest, Tensor) else comparison.rest
    known = comparison._replace(
        ours=comparison.ours[finite],
        eager=comparison.eager[finite],
        oracle=comparison.oracle[finite],
        rest=rest,
    )
    ours, eager, exact = known.errors()
    if not ours.numel():
        return (float("nan"),) * 3
    if comparison.few is not None:
        return (
            ours.abs().max().item(),
            eager.abs().max().item(),
            2 * comparison.eps * comparison.few,
        )
    rms = [x.square().mean().sqrt().item() for x in (ours, eager, exact)]
    return rms[0], rms[1], 0.5 * comparison.eps * rms[2]
