"""Samples of several steps, interleaved so that a change of clocks or neighbours falls on all of
them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from .device import Cpu, Cuda

# the least and the most rounds
ROUNDS = {"cpu": (5, 25), "cuda": (20, 200)}


def interleaved(
    device: Cpu | Cuda,
    steps: Mapping[Any, Callable[[], Any]],
    seconds: float,
    least: int | None = None,
) -> dict[Any, list[float]]:
    """Milliseconds of each step, round by round, the order rotating; for `seconds` and at least
    that many rounds."""
    for step in steps.values():
        step()
    device.synchronize()
    samples: dict[Any, list[float]] = {name: [] for name in steps}
    names = list(steps)
    enough, most = ROUNDS[device.kind]
    least = enough if least is None else least
    start = time.monotonic()
    for turn in range(most):
        if turn >= least and time.monotonic() - start > seconds:
            break
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            samples[name].append(device.sample(steps[name]))
    return samples


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles in ms, and how many samples they are of."""
    low, middle, high = (
        statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    )
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "samples": len(samples)}
