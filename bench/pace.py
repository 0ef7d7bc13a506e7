"""How long a measurement takes: a prediction for its progress, and which steps are too slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from pre_kernels.check.device import Cpu, Cuda

from . import baselines, shapes

# seconds of sampling a shape, beyond the minimum of rounds
SECONDS = {"cpu": 8.0, "cuda": 5.0}
# Seconds that a check against float64 takes at the largest shape of a CPU, and a process that
# measures memory, which imports torch.
CHECK = 4.0
PEAK = 8.0
# A baseline whose step takes longer than these seconds is not measured.
STEP_LIMIT = 20.0
# The time of a step is estimated from this many rows.
FEW = 256

# Is told what begins, and for how many seconds it is predicted to run.
Tell = Callable[[str, float], object]


def silent(what: str, seconds: float) -> None:
    pass


def predicted(names: Iterable[str], device: Cpu | Cuda, seconds: float | None) -> float:
    """Return about how many seconds the baselines of one shape take."""
    chosen = [baselines.BY_NAME[name] for name in names]
    each = CHECK + (PEAK if device.kind == "cpu" else 0.0)
    compiles = sum(baseline.compiles for baseline in chosen)
    return len(chosen) * each + compiles + (SECONDS[device.kind] if seconds is None else seconds)


def too_slow(
    baseline: baselines.Baseline, shape: shapes.Shape, dtype: str, device: Cpu | Cuda, limit: float
) -> str | None:
    """Return why a step of a baseline is not waited for; None if it takes at most `limit` seconds.

    Some CPUs multiply half-precision numbers at less than 1 GFLOP/s, so that a step of a second
    takes minutes, and nothing can interrupt a matmul. A few rows tell.
    """
    if device.kind != "cpu" or shape.selected < 4 * FEW or baseline.compiles:
        return None
    few = replace(shape, batch=1, tokens=FEW * shape.tokens // shape.visual, visual=FEW)
    case = shapes.case(few, shapes.DTYPES[dtype], device.torch_device)
    if baseline.build is None:
        step = baselines.floor(case)
    else:
        step = baselines.step(baseline.build(), baselines.own_case(baseline, case))
    step()
    start = time.perf_counter()
    step()
    seconds = (time.perf_counter() - start) * shape.selected / FEW
    if seconds <= limit:
        return None
    return (
        f"a step takes about {seconds:.0f} s here, by the time of {FEW} of its rows; "
        f"--step-limit {2 * seconds:.0f} waits for it (got {limit:g})"
    )
