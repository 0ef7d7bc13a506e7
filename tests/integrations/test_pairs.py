"""The generator of cases that the option tests and the matrix of families share."""

from __future__ import annotations

import itertools
from typing import Any

from .support.pairs import pairs

AXES: dict[str, Any] = {
    "a": range(30),
    "b": [None, "x"],
    "c": [[1], [2], [1, 2]],
    "d": "pqr",
    "e": [False, True],
}


def taken(cases: list[dict[str, Any]]) -> set[Any]:
    return {
        pair
        for case in cases
        for pair in itertools.combinations([(k, repr(v)) for k, v in case.items()], 2)
    }


def product(allowed: Any = lambda case: True) -> list[dict[str, Any]]:
    return [
        c
        for v in itertools.product(*AXES.values())
        if allowed(c := dict(zip(AXES, v, strict=True)))
    ]


def test_every_pair_is_there_and_few_cases_are_needed() -> None:
    cases = pairs(AXES)
    assert taken(cases) == taken(product())
    assert 90 <= len(cases) <= 95  # at least 30 · 3 cases
    assert cases == pairs(AXES)


def test_pairs_that_no_allowed_case_has_are_left_out() -> None:
    def allowed(case: dict[str, Any]) -> bool:
        return not (case["b"] == "x" and case["d"] == "q") and (case["a"] < 3 or case["e"])

    cases = pairs(AXES, allowed)
    assert all(map(allowed, cases))
    assert taken(cases) == taken(product(allowed))


def test_one_axis() -> None:
    assert pairs({"a": [1, 2]}) == [{"a": 1}, {"a": 2}]
