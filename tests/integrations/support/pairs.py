"""A short list of cases in which every pair of values of two axes occurs."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def pairs(
    axes: Mapping[str, Sequence[Any]], allowed: Callable[[dict[str, Any]], bool] = lambda case: True
) -> list[dict[str, Any]]:
    """Cases {axis: value}, the one with the most new pairs first. Every pair of values of two axes
    that occurs in an allowed case is in one of them.

    Greedy over the full product, so the list is the same each time. Values need not be hashable.
    """

    def covers(case: Sequence[int]) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2 if len(axes) > 1 else 1))

    def values(case: Sequence[int]) -> dict[str, Any]:
        return {name: axes[name][index] for name, index in zip(axes, case, strict=True)}

    product = itertools.product(*(range(len(options)) for options in axes.values()))
    candidates = [case for case in product if allowed(values(case))]
    missing = set().union(*map(covers, candidates))
    # The gain of a case can only fall, so the last known gain is an upper bound, and only the top
    # of the heap has to be computed again.
    heap = [(-(len(axes) ** 2), case) for case in candidates]
    cases = []
    while missing:
        _, case = heapq.heappop(heap)
        gain = len(covers(case) & missing)
        if heap and gain < -heap[0][0]:
            heapq.heappush(heap, (-gain, case))
            continue
        missing -= covers(case)
        cases.append(values(case))
    return cases
