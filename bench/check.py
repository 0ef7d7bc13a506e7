"""The gate before every figure: loss and gradients against float64, by the error rule of the tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from pre_kernels import reference

ROOT = Path(__file__).resolve().parents[1]


def _load_oracle() -> ModuleType:
    """tests/oracle.py under the name by which the tests import it, so that there is one of it."""
    if "oracle" not in sys.modules:
        spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests" / "oracle.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["oracle"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["oracle"])
    return sys.modules["oracle"]


oracle = _load_oracle()


WRONG = {2: 5.0, 4: 100.0}  # × eager's error, by bytes of an element, is no rounding: float32 sums may be poor ones


class Verdict(NamedTuple):
    failure: str | None  # what was outside the rule; None = nothing
    error_ratio: float  # the largest rms error over the gradients, each ÷ that of eager in the same dtype
    wrong: bool  # and not merely rounded worse than the rule allows, which is a finding and no reason to hide a peer


class Judge:
    """Holds eager's result and the float64 one of a case; calling it judges a function on that case."""

    def __init__(self, case: oracle.Case) -> None:
        self.case = case
        self.eager = oracle.run(reference.pre_loss, case)
        self.truth = oracle.run(reference.pre_loss, case, torch.float64)
        wide = {name: x.double() for name, x in case.tensors.items()}
        with torch.no_grad():
            losses = reference.pre_loss(**wide, rows=case.rows, **case.options | {"reduction": "none"})
        self.scale = losses.abs().mean().item()  # on which the rounding of the summed loss acts

    def __call__(self, function: Callable[..., torch.Tensor]) -> Verdict:
        result = oracle.run(function, self.case)
        eps = torch.finfo(self.case.product_dtype).eps
        ratio = max(self._ratio(name, value) for name, value in result.items() if value.numel() >= 64)
        try:
            for name, value in result.items():
                few = self.scale if value.numel() < 64 else None
                oracle.judge(name, value, self.eager[name], self.truth[name], eps, few)
        except AssertionError as error:
            return Verdict(str(error), ratio, not ratio < WRONG[self.case.product_dtype.itemsize])
        return Verdict(None, ratio, False)

    def _ratio(self, name: str, value: torch.Tensor) -> float:
        ours, eager = ((x.double() - self.truth[name]).square().mean().sqrt() for x in (value, self.eager[name]))
        return (ours / eager).item()
