"""The goals on a GPU, and what was measured for each. Every number comes from records; where there
are none, the table says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from pre_kernels.check.guarantees import CAPTURED, NO_BREAK, NO_SYNC

from . import goals, shapes
from .goals import ABSENT, Finding, Goal, Record, fastest_of_ours, field, having, runs
from .tables import over_floor

# × the lower bound. These are the first goals; the table has tighter ones after them.
BLAS = 1.10
MASK = 1.25
# outcome of a guarantee that is kept
KEPT = {"sync": NO_SYNC, "graph": CAPTURED, "fullgraph": NO_BREAK}
MAIN = "llava15-7b-sft"
SMALL = "qwen25vl-7b-small"
NO_GPU = "not yet measured (no GPU)"
CARDS = "H100 or H200"
COMPILED = ("compile", "compile-max")


def _main(records: list[Record], **fields: Any) -> dict[str, Record]:
    """Return the last run of the main shape."""
    about = {"kind": "loss", "shape": MAIN, "dtype": "bf16", "selection": "index", **fields}
    return next(iter(reversed(runs(records, **about))), {})


def _over_floor(run: dict[str, Record], ours: Record | None) -> Finding | None:
    if ours is None or not (ratio := over_floor(run, ours["peer"])):
        return None
    return Finding(ratio, "", [entry for entry in (ours, run.get("floor")) if entry], ours["peer"])


def blas_time(records: list[Record]) -> Finding | None:
    run = _main(records)
    return _over_floor(run, run.get("ours-blas"))


def mask_time(records: list[Record]) -> Finding | None:
    """Return the time of triton ÷ the floor, if a call with such a mask did not wait for the
    device."""
    call = {"kind": "sync", "item": "mask, leading anchor", "peer": "ours-triton"}
    kept = having(records, **call, outcome=KEPT["sync"])
    run = _main(records, selection="mask")
    return _over_floor(run, run.get("ours-triton")) if kept else None


def small_workspace(records: list[Record]) -> Finding | None:
    kept = [
        entry
        for entry in having(records, kind="workspace", shape=MAIN)
        if entry.get("item", 65) <= 64 and "over_floor" in entry
    ]
    best = min(kept, key=lambda entry: entry["over_floor"], default=None)
    return best and Finding(best["over_floor"], "", [best], f"{best['peer']}, {best['item']} MiB")


def every_shape(records: list[Record]) -> Finding | None:
    """Return the worst of the shapes, each with the best of ours."""
    wanted = {shape.name for shape in shapes.GPU if shape.selected >= 2304}
    ratios: dict[str, Finding] = {}
    for run in runs(records, kind="loss", dtype="bf16", selection="index"):
        shape = next(iter(run.values()))["shape"]
        if shape in wanted and (ratio := _over_floor(run, fastest_of_ours(run))):
            ratios[shape] = ratio
    if not ratios:
        return None
    shape, worst = max(ratios.items(), key=lambda pair: pair[1].value or 0.0)
    what = f"{worst.what} at {shape}, the worst of {len(ratios)} of {len(wanted)} shapes"
    if len(ratios) < len(wanted):
        return Finding(None, f"{worst.value:.2f} so far", worst.source, what)
    return worst._replace(what=what)


def speedup(others: Sequence[str], shape: str, records: list[Record]) -> Finding | None:
    """Return the speed of the best of ours over the fastest of some baselines."""
    run = _main(records, shape=shape)
    ours = fastest_of_ours(run)
    other = min(
        (run[name] for name in others if name in run),
        key=lambda entry: entry["median_ms"],
        default=None,
    )
    if ours is None or other is None:
        return None
    theirs = over_floor(run, other["peer"])
    own = over_floor(run, ours["peer"])
    if theirs is None or own is None:
        return None
    return Finding(theirs / own, "", [ours, other], f"{ours['peer']} over {other['peer']}")


def launches(records: list[Record]) -> Finding | None:
    """Return the launches of the implementation that is the fastest at that size, else of the one
    with the fewest."""
    steps = having(records, kind="step", shape=SMALL)
    steps = [entry for entry in steps if "ours-" in entry["peer"]]
    fastest = fastest_of_ours(_main(records, shape=SMALL))
    steps = [entry for entry in steps if fastest and entry["peer"] == fastest["peer"]] or steps
    fewest = min(steps, key=lambda entry: entry["launches"], default=None)
    return fewest and Finding(fewest["launches"], "", [fewest], fewest["peer"])


def memory(n: int, records: list[Record]) -> Finding | None:
    """Return the peak beyond the returned gradients ÷ the formula, of the fastest of ours."""
    fields = {"n": n, "d": 4096, "m": 4096, "z": 4096, "dtype": "bf16", "selection": "index"}
    known = [run for run in runs(records, **fields) if "peak_mib" in (fastest_of_ours(run) or {})]
    ours = fastest_of_ours(known[-1]) if known else None
    if ours is None:
        return None
    extra = ours["peak_mib"] - ours["returned_mib"]
    what = f"{ours['peer']}, {extra:,.0f} of {ours['formula_mib']:,.0f} MiB"
    return Finding(extra / ours["formula_mib"], "", [ours], what)


def kept_guarantees(kind: str, records: list[Record]) -> Finding | None:
    """Return how many calls broke a guarantee."""
    calls = having(records, kind=kind, shape=MAIN)
    broken = [entry for entry in calls if entry["outcome"] != KEPT[kind]]
    names = "; ".join(f"{entry['peer']}, {entry['item']}: {entry['outcome']}" for entry in broken)
    text = f"{len(broken)} of {len(calls)} calls"
    return Finding(len(broken), text, calls, names) if calls else None


def fp8_time(records: list[Record]) -> Finding | None:
    run = _main(records)
    ratio = _over_floor(run, run.get("ours-fp8"))
    return ratio and ratio._replace(what=f"ours-fp8, {run['ours-fp8'].get('own_rule', 'no rule')}")


def first_call(item: str) -> Callable[[list[Record]], Finding | None]:
    return partial(field, "firstcall", "seconds", item=item)


def training(ratio: str) -> Callable[[list[Record]], Finding | None]:
    return partial(field, "training", ratio, item="llava15-7b")


UNBROKEN = partial(kept_guarantees, "fullgraph")
GOALS = [
    Goal("blas ÷ floor, LLaVA-1.5-7B, integer rows", "≤", BLAS, blas_time),
    Goal("blas ÷ floor, LLaVA-1.5-7B, integer rows, next", "≤", 1.05, blas_time),
    Goal("triton ÷ floor, LLaVA-1.5-7B, a mask and no host sync", "≤", MASK, mask_time),
    Goal("triton ÷ floor, LLaVA-1.5-7B, a mask and no host sync, next", "≤", 1.15, mask_time),
    Goal("time ÷ floor, workspace of at most 64 MiB", "≤", 1.15, small_workspace),
    Goal("time ÷ floor, every shape with N ≥ 2,304", "≤", 1.15, every_shape),
    Goal("speed over eager", "≥", 1.6, partial(speedup, ("eager",), MAIN)),
    Goal("speed over the best of torch.compile", "≥", 1.3, partial(speedup, COMPILED, MAIN)),
    Goal("speed over Liger", "≥", 1.5, partial(speedup, ("liger",), MAIN)),
    Goal("speed over VIRAL's method", "≥", 3.0, partial(speedup, ("viral",), MAIN)),
    Goal("speed over torch.compile, N = 256", "≥", 1.2, partial(speedup, COMPILED, SMALL)),
    Goal("launches of a step, N = 256", "≤", 16, launches),
    Goal("peak memory ÷ formula, N = 9,216", "≤", 1.0, partial(memory, 9216)),
    Goal("peak memory ÷ formula, N = 131,072", "≤", 1.0, partial(memory, 131072)),
    Goal("calls with a host sync", "≤", 0, partial(kept_guarantees, "sync")),
    Goal("calls that no CUDA graph captures", "≤", 0, partial(kept_guarantees, "graph")),
    Goal("calls with a graph break under torch.compile", "≤", 0, UNBROKEN),
    Goal("time ÷ the bf16 floor in fp8", "≤", 0.80, fp8_time),
    Goal("seconds of the first call", "≤", 30, first_call("cold cache")),
    Goal("seconds of the first call, kernels cached", "≤", 2, first_call("warm cache")),
    Goal("training step of LLaVA-1.5-7B, time", "≤", 1.01, training("time_ratio")),
    Goal("training step of LLaVA-1.5-7B, memory", "≤", 1.005, training("memory_ratio")),
]


def table(records: Iterable[Record], absent: str = ABSENT) -> list[Sequence[str]]:
    """Return the header and a row for each goal and GPU, from the records with its last version of
    torch and triton. `absent` fills the cell of a goal without records."""
    of_gpus = goals.by_device(entry for entry in records if entry.get("capability"))
    return goals.table(
        GOALS, "card", of_gpus, CARDS, NO_GPU if absent == ABSENT and not of_gpus else absent
    )
