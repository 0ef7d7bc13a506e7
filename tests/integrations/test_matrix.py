"""Every pair of values of family, checkpointing, loop, tuning and processes. Cases whose values all
occur in earlier ones are slow tests. `--full-matrix` runs every combination.

`make test-oldest` runs the same on transformers 4.57, so every value is also paired with both
versions.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from .support.by_hand import assert_same_gradients
from .support.matrix import AXES, Case, allowed, gradients, upstream, wanted
from .support.pairs import pairs
from .support.processes import both


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        full = [
            dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())
        ]
        cases = full if metafunc.config.getoption("--full-matrix") else pairs(AXES, allowed)
        met: set[tuple[str, Any]] = set()
        parameters = []
        for case in cases:
            marks = [] if case.items() - met else [pytest.mark.slow]
            parameters.append(pytest.param(Case(**case), marks=marks, id=str(Case(**case))))
            met |= case.items()
        metafunc.parametrize("case", parameters)


def test_gradients_of_a_step(case: Case, tmp_path: Path) -> None:
    if reason := upstream(case._asdict()):
        pytest.skip(reason)
    found = (
        [gradients(case, str(tmp_path))]
        if case.processes == 1
        else both(gradients, case, str(tmp_path))
    )
    expected = wanted(case, str(tmp_path))
    for one in found:
        assert_same_gradients(one, expected)
