"""A uniform sample, of fixed size, from a stream of unknown length."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from typing import Any

from . import inputs


class Reservoir:
    """Draws a random number for each item, and keeps the `limit` items with the largest ones.

    Every subset is equally likely, however the stream is split into calls. The same seed keeps the
    same positions of the stream. The samples of several processes merge into a sample of the whole;
    give each process its own seed.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        inputs.check_positive("limit", limit)
        self.limit = limit
        self._random = random.Random(seed)
        # A heap of (draw, count, item). No two counts are equal, so items are never compared.
        self._kept: list[tuple[float, int, Any]] = []
        self._seen = 0

    def offer(self, count: int, take: Callable[[Sequence[int]], Sequence[Any]]) -> None:
        """Offer items 0..count - 1. `take` is called at most once, with the numbers of the items to
        keep, and returns these items in the same order."""
        drawn = [self._random.random() for _ in range(count)]
        best = heapq.nlargest(self.limit, range(count), key=drawn.__getitem__)
        least = self._kept[0][0] if len(self._kept) == self.limit else -1.0
        chosen = sorted(place for place in best if drawn[place] > least)
        if chosen:
            for place, item in zip(chosen, take(chosen), strict=True):
                self._keep(drawn[place], item)

    def merge(self, other: Reservoir) -> None:
        """Add the items that another `Reservoir` kept. The result is a sample of both streams if
        both have the same limit."""
        for draw, _, item in sorted(other._kept, key=lambda kept: kept[1]):
            self._keep(draw, item)

    def items(self) -> list[Any]:
        """The kept items, in the order they came."""
        return [item for _, _, item in sorted(self._kept, key=lambda kept: kept[1])]

    def _keep(self, draw: float, item: Any) -> None:
        entry = (draw, self._seen, item)
        self._seen += 1
        if len(self._kept) < self.limit:
            heapq.heappush(self._kept, entry)
        else:
            heapq.heappushpop(self._kept, entry)
