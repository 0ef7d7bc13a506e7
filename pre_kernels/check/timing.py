"""Sample several steps in turn, so that a change of clocks or neighbours affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from .device import Cpu, Cuda

# These are the least and the most rounds.
ROUNDS = {"cpu": (5, 25), "cuda": (20, 200)}


def interleaved(
    device: Cpu | Cuda,
    steps: Mapping[Any, Callable[[], Any]],
    seconds: float,
    least: int | None = None,
) -> dict[Any, list[float]]:
    """Return milliseconds of each step, in rounds whose order rotates, for `seconds` and at least
    `least` rounds."""
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
    """Return median and quartiles in ms, and the number of samples."""
    low, middle, high = (
        statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    )
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "samples": len(samples)}
