"""Select PRe's warnings from those that a test has caught."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any


def pre_warnings(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if str(w.message).startswith("PRe: ")]


def said(do: Callable[[], Any]) -> list[str]:
    """PRe's warnings while `do` runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        do()
    return pre_warnings(caught)
