"""The gate before every figure: loss and gradients against float64, by the error rule of the tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
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
    relative: float  # the largest rms error over the gradients, each ÷ that gradient's own rms
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

    def __call__(self, function: Callable[..., torch.Tensor], gate: float | None = None) -> Verdict:
        """By the error rule; with a `gate` by that alone: a bound on the relative rms error of each gradient."""
        result = oracle.run(function, self.case)
        eps = torch.finfo(self.case.product_dtype).eps
        many = {name: value for name, value in result.items() if value.numel() >= 64}
        ratio = _largest(self._rms(name, value) / self._rms(name, self.eager[name]) for name, value in many.items())
        relative = _largest(self._rms(name, value) / _rms(self.truth[name]) for name, value in many.items())
        if gate is not None:
            loss = self._rms("loss", result["loss"]) / self.scale
            if relative <= gate and loss <= gate:
                return Verdict(None, ratio, relative, False)
            return Verdict(f"relative error {relative:.3g}, of the loss {loss:.3g} > {gate}", ratio, relative, True)
        try:
            for name, value in result.items():
                few = self.scale if value.numel() < 64 else None
                oracle.judge(oracle.Comparison(name, value, self.eager[name], self.truth[name], eps, few))
        except AssertionError as error:
            return Verdict(str(error), ratio, relative, not ratio < WRONG[self.case.product_dtype.itemsize])
        return Verdict(None, ratio, relative, False)

    def _rms(self, name: str, value: torch.Tensor) -> float:
        return _rms(value.double() - self.truth[name])


def _rms(value: torch.Tensor) -> float:
    return value.square().mean().sqrt().item()


def _largest(values: Iterable[float]) -> float:
    """nan if any is."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()
