"""The error rule on fuzzed cases, and what it says where eager's own error is luck.

The rule of oracle.py compares two samples of rounding noise. Where a few rows or elements dominate a tensor, eager's
error may be small by chance, and eager itself breaks the rule against its own error on another sample. So a tensor
outside the rule is judged again by the same rule over an ensemble: the case and neighbours of it, alike but for the
bits that are rounded. What is worse than eager fails that too, and is a violation; what passes is counted as "luck".

An overflow in eager is no error to compare with: where ours is finite, as float64 is, and eager is not, ours is held
against float64 alone; where ours overflows and eager is within 4 eps of the largest number, neither says anything
("overflow").

float64 has no wider oracle to show eager's error: there that is estimated as twice eager's error in float32 on the same
numbers, which measures how well the problem is conditioned, × 2⁻²⁹; ours is compared with eager in float64.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import oracle
import torch
from fuzz_cases import Spec, build
from torch import Tensor

from pre_kernels import fused_pre_loss, reference

ENSEMBLES = (32, 128, 512)  # the last decides: with so many an RMS is known to some percent
WITHIN, OVERFLOW, LUCK, VIOLATION = "within", "overflow", "luck", "violation"


class Outcome(NamedTuple):
    """Of the loss or a gradient. Errors are RMS, or the largest where elements are few; nan if nothing is finite."""

    name: str
    verdict: str
    error: float
    eager: float
    allowed: float  # what the rule allows beside eager's error
    message: str


def run(spec: Spec, device: torch.device | str = "cpu") -> list[Outcome]:
    """The outcome of each tensor of a case."""
    case, extra = build(spec, device)

    def function(**arguments: Any) -> Tensor:
        return fused_pre_loss(**arguments, **extra, impl=spec.impl)

    ensemble, outcomes = Ensemble(function, case), []
    for one in oracle.comparisons(function, case):
        if case.product_dtype == torch.float64:
            one = one._replace(eager=ensemble.member(0)[one.name][1])
        verdict, message = WITHIN, ""
        try:
            oracle.judge(*one)
        except AssertionError as error:
            message = str(error)
            verdict = OVERFLOW if _holds(_without_overflow(one)) else LUCK if ensemble.holds(one) else VIOLATION
        outcomes.append(Outcome(one.name, verdict, *_sizes(one), message))
    return outcomes


class Ensemble:
    """A case and its neighbours, computed when they are first asked for."""

    def __init__(self, function: Any, case: oracle.Case) -> None:
        self.function, self.case = function, case
        self.members: list[dict[str, tuple[Tensor, Tensor, Tensor]]] = []

    def member(self, i: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """ours, eager and float64 of each tensor, on neighbour `i`; 0 is the case itself."""
        while len(self.members) <= i:
            number = len(self.members)
            case = neighbour(self.case, number)
            ours, exact = oracle.run(self.function, case), oracle.run(reference.pre_loss, case, torch.float64)
            eager = oracle.run(reference.pre_loss, case)
            if case.product_dtype == torch.float64:
                eager = {name: exact[name] + error for name, error in _estimated_errors(self.case, number).items()}
            self.members.append({name: (ours[name], eager[name], exact[name]) for name in ours})
        return self.members[i]

    def holds(self, one: oracle.Comparison) -> bool:
        """Whether the rule holds for all members taken together, for the first size at which it does."""
        for size in ENSEMBLES:
            members = [self.member(i)[one.name] for i in range(size)]
            ours, eager, exact = (torch.cat([x.reshape(-1) for x in kind]) for kind in zip(*members, strict=True))
            if _holds(_without_overflow(oracle.Comparison(one.name, ours, eager, exact, one.eps, None))):
                return True
        return False


def neighbour(case: oracle.Case, number: int) -> oracle.Case:
    """0: the case itself; else the same problem for every purpose but rounding.

    Inputs differ by up to 2 eps; row weights, the upstream gradient and each column of the predictions, with that of
    the anchors, by a factor between ½ and 1: parallel vectors stay parallel. The last bits alone would not do where
    rows are the same: what is lost depends on the leading ones too.
    """
    if number == 0:
        return case
    g = torch.Generator().manual_seed(number)
    columns = 2 ** -torch.rand(case.tensors["w2"].shape[0], generator=g, dtype=torch.float64)
    factors = {"w2": columns[:, None], "b2": columns, "anchor": columns}

    def near(name: str, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype if name == "anchor" else case.product_dtype).eps
        change = (1 + eps * torch.randint(-2, 3, x.shape, generator=g)) * factors.get(name, 1)
        return (x.double() * change.to(x.device)).to(x.dtype)

    tensors = {name: None if x is None else near(name, x) for name, x in case.tensors.items()}
    options = dict(case.options)
    if (weight := options.get("row_weight")) is not None:
        options["row_weight"] = weight * 2 ** -torch.rand(weight.shape, generator=g).to(weight.device)
    upstream = case.upstream * 2 ** -torch.rand((), generator=g).item()
    return dataclasses.replace(case, tensors=tensors, options=options, upstream=upstream)


def _estimated_errors(case: oracle.Case, number: int) -> dict[str, Tensor]:
    """Of eager in float64 on a neighbour."""
    tensors = {name: None if x is None else x.float() for name, x in case.tensors.items()}
    # of the case in float32, whose last bits are others
    case = neighbour(dataclasses.replace(case, tensors=tensors), number)
    exact = oracle.run(reference.pre_loss, case, torch.float64)
    return {name: 2**-28 * (value - exact[name]) for name, value in oracle.run(reference.pre_loss, case).items()}


def _without_overflow(one: oracle.Comparison) -> oracle.Comparison:
    """Without the elements that overflowed in eager and not in ours, or in ours where eager's are at the very edge."""
    edge = (1 - 4 * one.eps) * torch.finfo(one.ours.dtype).max
    spared = ~one.eager.isfinite() & one.ours.isfinite() & one.oracle.isfinite()
    edged = ~one.ours.isfinite() & one.eager.isfinite() & (one.eager.abs() >= edge)
    return one._replace(
        ours=torch.where(edged, one.oracle, one.ours.double()),
        eager=torch.where(spared | edged, one.oracle, one.eager.double()),
    )


def _holds(one: oracle.Comparison) -> bool:
    try:
        oracle.judge(*one)
    except AssertionError:
        return False
    return True


def _sizes(one: oracle.Comparison) -> tuple[float, float, float]:
    finite = one.eager.isfinite() & one.ours.isfinite() & one.oracle.isfinite()
    ours, eager, exact = (x.double()[finite] for x in (one.ours, one.eager, one.oracle))
    if not ours.numel():
        return (float("nan"),) * 3
    if one.few is not None:
        return (ours - exact).abs().max().item(), (eager - exact).abs().max().item(), 2 * one.eps * one.few
    rms = [x.square().mean().sqrt().item() for x in (ours - exact, eager - exact, exact)]
    return rms[0], rms[1], 0.5 * one.eps * rms[2]
