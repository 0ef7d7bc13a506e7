"""Which tests `make test` leaves to `make test-full`: those that are marked `slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], every: int) -> list[Any]:
    """Values for `parametrize`. Every `every`-th, from the first on, is in `make test`."""
    return [
        pytest.param(value, marks=pytest.mark.slow) if place % every else value
        for place, value in enumerate(values)
    ]
