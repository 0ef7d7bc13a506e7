"""The goals on a GPU and a CPU beside what was measured: each figure comes out of records, or is
said to be missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from pre_kernels.check.guarantees import HELD, WHOLE

from . import shapes
from .tables import over_floor

BLAS, MASK = 1.10, 1.25  # × the floor: the first goals, after which tighter ones stand in the table
KEPT = {
    "sync": "no sync",
    "graph": HELD,
    "fullgraph": WHOLE,
}  # what is said of a promise that is kept
MAIN, SMALL = "llava15-7b-sft", "qwen25vl-7b-small"
SETTING = ("torch", "triton", "threads")
ABSENT, NO_GPU = "not yet measured", "not yet measured (no GPU)"
CARDS, A_CPU = "H100 or H200", "a CPU"

Record = dict[str, Any]


class Found(NamedTuple):
    value: float | None  # held against the bound; None: `text` says what is wrong
    text: str
    source: Sequence[Record]  # what it comes from
    what: str = ""  # which peer, shape, ...


class Goal(NamedTuple):
    name: str
    sign: str  # "≤" or "≥"
    bound: float
    find: Callable[[list[Record]], Found | None]


def _runs(records: Iterable[Record], **fields: Any) -> list[dict[str, Record]]:
    """Timed records of the loss by peer, for each run that has these fields."""
    runs: dict[str, dict[str, Record]] = {}
    for one in records:
        if "median_ms" in one and all(one.get(name) == value for name, value in fields.items()):
            runs.setdefault(one["group"], {})[one["peer"]] = one
    return list(runs.values())


def _main(records: list[Record], **fields: Any) -> dict[str, Record]:
    """The last run of the main shape."""
    about = {"kind": "loss", "shape": MAIN, "dtype": "bf16", "selection": "index", **fields}
    return next(iter(reversed(_runs(records, **about))), {})


def _ours(run: dict[str, Record]) -> Record | None:
    """The fastest of ours, fp8 apart."""
    times = [one for name, one in run.items() if name.startswith("ours-") and name != "ours-fp8"]
    return min(times, key=lambda one: one["median_ms"], default=None)


def _over_floor(run: dict[str, Record], ours: Record | None) -> Found | None:
    ratio = over_floor(run, ours["peer"]) if ours else None
    return (
        Found(ratio, "", [one for one in (ours, run.get("floor")) if one], ours["peer"])
        if ratio
        else None
    )


def blas_time(records: list[Record]) -> Found | None:
    run = _main(records)
    return _over_floor(run, run.get("ours-blas"))


def mask_time(records: list[Record]) -> Found | None:
    """Of triton, if it was seen not to wait for the device with such a mask."""
    calls = [
        one for one in records if one["kind"] == "sync" and one["item"] == "mask, leading anchor"
    ]
    kept = any(one["peer"] == "ours-triton" and one["outcome"] == KEPT["sync"] for one in calls)
    run = _main(records, selection="mask")
    return _over_floor(run, run.get("ours-triton")) if kept else None


def small_workspace(records: list[Record]) -> Found | None:
    kept = [
        one
        for one in records
        if one["kind"] == "workspace"
        and one["shape"] == MAIN
        and one.get("item", 65) <= 64
        and "over_floor" in one
    ]
    best = min(kept, key=lambda one: one["over_floor"], default=None)
    return best and Found(best["over_floor"], "", [best], f"{best['peer']}, {best['item']} MiB")


def every_shape(records: list[Record]) -> Found | None:
    """The worst of the shapes, each with the best of ours."""
    wanted = {shape.name for shape in shapes.GPU if shape.selected >= 2304}
    found = {}
    for run in _runs(records, kind="loss", dtype="bf16", selection="index"):
        shape = next(iter(run.values()))["shape"]
        if shape in wanted and (ratio := _over_floor(run, _ours(run))):
            found[shape] = ratio
    if not found:
        return None
    worst = max(found, key=lambda shape: found[shape].value)
    what = f"{found[worst].what} at {worst}, the worst of {len(found)} of {len(wanted)} shapes"
    if len(found) < len(wanted):
        return Found(None, f"{found[worst].value:.2f} so far", found[worst].source, what)
    return found[worst]._replace(what=what)


def speedup(others: Sequence[str], shape: str, records: list[Record]) -> Found | None:
    """Of the best of ours over the fastest of some other peers."""
    run = _main(records, shape=shape)
    ours = _ours(run)
    other = min(
        (run[name] for name in others if name in run),
        key=lambda one: one["median_ms"],
        default=None,
    )
    if ours is None or other is None:
        return None
    theirs, own = over_floor(run, other["peer"]), over_floor(run, ours["peer"])
    if theirs is None or own is None:
        return None
    return Found(theirs / own, "", [ours, other], f"{ours['peer']} over {other['peer']}")


def launches(records: list[Record]) -> Found | None:
    """Of the implementation that is the fastest at that size, else of the one with the fewest."""
    steps = [
        one
        for one in records
        if one["kind"] == "step" and one["shape"] == SMALL and "ours-" in one["peer"]
    ]
    fastest = _ours(_main(records, shape=SMALL))
    steps = [one for one in steps if fastest and one["peer"] == fastest["peer"]] or steps
    fewest = min(steps, key=lambda one: one["launches"], default=None)
    return fewest and Found(fewest["launches"], "", [fewest], fewest["peer"])


def memory(n: int, records: list[Record]) -> Found | None:
    """Peak beyond the gradients returned ÷ the formula, of the fastest of ours."""
    fields = {"n": n, "d": 4096, "m": 4096, "z": 4096, "dtype": "bf16", "selection": "index"}
    runs = [run for run in _runs(records, **fields) if "peak_mib" in (_ours(run) or {})]
    ours = _ours(runs[-1]) if runs else None
    if ours is None:
        return None
    extra = ours["peak_mib"] - ours["returned_mib"]
    what = f"{ours['peer']}, {extra:,.0f} of {ours['formula_mib']:,.0f} MiB"
    return Found(extra / ours["formula_mib"], "", [ours], what)


def kept_promises(kind: str, records: list[Record]) -> Found | None:
    """How many calls broke a promise."""
    calls = [one for one in records if one["kind"] == kind and one["shape"] == MAIN]
    broken = [one for one in calls if one["outcome"] != KEPT[kind]]
    names = "; ".join(f"{one['peer']}, {one['item']}: {one['outcome']}" for one in broken)
    return (
        Found(len(broken), f"{len(broken)} of {len(calls)} calls", calls, names) if calls else None
    )


def fp8_time(records: list[Record]) -> Found | None:
    run = _main(records)
    found = _over_floor(run, run.get("ours-fp8"))
    return found and found._replace(what=f"ours-fp8, {run['ours-fp8'].get('own_rule', 'no rule')}")


def field(kind: str, name: str, records: list[Record], **fields: Any) -> Found | None:
    """The worst (largest) of a field, over the peers."""
    kept = [
        one
        for one in records
        if one["kind"] == kind and all(one.get(key) == fields[key] for key in fields)
    ]
    worst = max(
        (one for one in kept if one.get(name) is not None), key=lambda one: one[name], default=None
    )
    failed = next((one for one in kept if "failed" in one), None)
    if failed:
        return Found(None, "failed", [failed], failed["failed"])
    return worst and Found(worst[name], "", [worst], worst.get("peer", worst.get("item", "")))


COMPILED = ("compile", "compile-max", "compile-chunked")

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
    Goal("speed over VIRAL's way", "≥", 3.0, partial(speedup, ("viral",), MAIN)),
    Goal("speed over torch.compile, N = 256", "≥", 1.2, partial(speedup, COMPILED, SMALL)),
    Goal("launches of a step, N = 256", "≤", 16, launches),
    Goal("peak memory ÷ formula, N = 9,216", "≤", 1.0, partial(memory, 9216)),
    Goal("peak memory ÷ formula, N = 131,072", "≤", 1.0, partial(memory, 131072)),
    Goal("calls with a host sync", "≤", 0, partial(kept_promises, "sync")),
    Goal("calls that no CUDA graph holds", "≤", 0, partial(kept_promises, "graph")),
    Goal(
        "calls with a graph break under torch.compile", "≤", 0, partial(kept_promises, "fullgraph")
    ),
    Goal("time ÷ the bf16 floor in fp8", "≤", 0.80, fp8_time),
    Goal(
        "seconds of the first call",
        "≤",
        30,
        partial(field, "firstcall", "seconds", item="cold cache"),
    ),
    Goal(
        "seconds of the first call, kernels cached",
        "≤",
        2,
        partial(field, "firstcall", "seconds", item="warm cache"),
    ),
    Goal(
        "training step of LLaVA-1.5-7B, time",
        "≤",
        1.01,
        partial(field, "training", "time_ratio", item="llava15-7b"),
    ),
    Goal(
        "training step of LLaVA-1.5-7B, memory",
        "≤",
        1.005,
        partial(field, "training", "memory_ratio", item="llava15-7b"),
    ),
]


CPU_SHAPES, CPU_SMALL = ("cpu-16k", "cpu-4k-encoder"), "cpu-small"
MODES = ("compile", "compile-max")
VLM = "smolvlm-256m"
CPU_KINDS = (
    "loss",
    "workspace",
    "training",
)  # other records of a CPU are of no goal, and of other numbers of threads


def milliseconds(one: Record) -> float | None:
    return one["median_ms"]


def extra(one: Record) -> float | None:
    """Peak MiB beyond the gradients returned."""
    return one["peak_mib"] - one["returned_mib"] if "peak_mib" in one else None


def over(
    others: Sequence[str],
    figure: Callable[[Record], float | None],
    dtypes: Sequence[str],
    names: Sequence[str],
    records: list[Record],
) -> Found | None:
    """A figure of ours ÷ the least of some other peers in the same run: the worst of the shapes of
    `names`, of how the rows are given, of `dtypes`."""
    found: list[Found] = []
    for run in _runs(records, kind="loss"):
        ours = _ours(run)
        if ours is None or ours["shape"] not in names or ours["dtype"] not in dtypes:
            continue
        own, known = (
            figure(ours),
            {name: value for name in others if name in run and (value := figure(run[name]))},
        )
        if own is not None and known:
            least = min(known, key=lambda name: known[name])
            what = (
                f"{ours['shape']} {ours['dtype']} {ours.get('selection', 'mask')}, beside {least}"
            )
            found.append(Found(own / known[least], "", [ours], what))
    return _worst(found)


def _worst(found: Sequence[Found]) -> Found | None:
    worst = max(found, key=lambda one: one.value or 0.0, default=None)
    return worst and worst._replace(
        what=worst.what + (f", the worst of {len(found)}" if len(found) > 1 else "")
    )


def small_memory(dtype: str, records: list[Record]) -> Found | None:
    """Extra peak with the workspace that takes the least ÷ eager's in the same sweep; the worst of
    the shapes."""
    sweeps: dict[str, list[Record]] = {}
    for one in records:
        if (
            one["kind"] == "workspace"
            and one["dtype"] == dtype
            and one["shape"] in CPU_SHAPES
            and "peak_mib" in one
        ):
            sweeps.setdefault(one["group"], []).append(one)
    found = []
    for sweep in sweeps.values():
        eager = next((extra(one) for one in sweep if one["peer"] == "eager"), None)
        ours = min(
            (one for one in sweep if "item" in one), key=lambda one: extra(one) or 0.0, default=None
        )
        if eager and ours:
            text = f"{ours['shape']} {dtype}, {ours['item']} MiB: {ours['over_floor']:.2f} × the floor's time"
            found.append(Found((extra(ours) or 0.0) / eager, "", [ours], text))
    return _worst(found)


def outside(records: list[Record]) -> Found | None:
    """How many runs of ours broke the error rule, and so have no time either."""
    judged = [
        one
        for one in records
        if one["kind"] == "loss"
        and one["shape"] in (*CPU_SHAPES, CPU_SMALL)
        and one["peer"].startswith("ours-")
        and ("failed" in one or "error_ratio" in one)
    ]
    broken = [one for one in judged if one.get("failed") or one.get("outside_rule")]
    where = [f"{one['shape']} {one['dtype']} {one.get('selection', 'mask')}" for one in broken]
    text = f"{len(broken)} of {len(judged)} runs"
    return Found(len(broken), text, broken or judged, "; ".join(where)) if judged else None


def _of_dtype(dtype: str, over_compiled: float) -> list[Goal]:
    def ratio(
        others: Sequence[str], figure: Callable[[Record], float | None]
    ) -> Callable[..., Found | None]:
        return partial(over, others, figure, (dtype,), CPU_SHAPES)

    return [
        Goal(
            f"{dtype}: time ÷ the best of torch.compile",
            "≤",
            over_compiled,
            ratio(MODES, milliseconds),
        ),
        Goal(f"{dtype}: time ÷ eager", "≤", 0.60, ratio(("eager",), milliseconds)),
        Goal(f"{dtype}: extra peak ÷ torch.compile's", "≤", 1.0, ratio(MODES, extra)),
        Goal(
            f"{dtype}: extra peak ÷ eager's, a small workspace",
            "≤",
            0.20,
            partial(small_memory, dtype),
        ),
    ]


CPU_GOALS = [
    *_of_dtype("bf16", 0.95),
    *_of_dtype("fp32", 0.85),
    Goal(
        "fp16: time ÷ eager",
        "≤",
        1.0,
        partial(over, ("eager",), milliseconds, ("fp16",), CPU_SHAPES),
    ),
    Goal(
        "N = 64, widths of 64: time ÷ eager",
        "≤",
        1.5,
        partial(over, ("eager",), milliseconds, ("bf16", "fp32"), (CPU_SMALL,)),
    ),
    Goal("runs outside the error rule", "≤", 0, outside),
    Goal(
        "training step of SmolVLM-256M, time",
        "≤",
        1.02,
        partial(field, "training", "time_ratio", item=VLM),
    ),
    Goal(
        "training step of SmolVLM-256M, memory",
        "≤",
        1.02,
        partial(field, "training", "memory_ratio", item=VLM),
    ),
]


def table(records: Iterable[Record], absent: str = ABSENT) -> list[Sequence[str]]:
    """Header and a row for each goal and GPU, from the records with its last version of torch and
    triton; `absent` stands where there are none."""
    of_gpus = _by_device(one for one in records if one.get("capability"))
    return _table(
        GOALS, "card", of_gpus, CARDS, NO_GPU if absent == ABSENT and not of_gpus else absent
    )


def cpu_table(records: Iterable[Record], absent: str = ABSENT) -> list[Sequence[str]]:
    """The same for CPUs, from the records with the last versions and number of threads."""
    of_cpus = _by_device(
        one for one in records if not one.get("capability") and one["kind"] in CPU_KINDS
    )
    return _table(CPU_GOALS, "CPU", of_cpus, A_CPU, absent)


def _by_device(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Of each device what was measured with the setting of its last record."""
    devices: dict[str, list[Record]] = {}
    for one in records:
        devices.setdefault(one["device"], []).append(one)
    for device, known in devices.items():
        last = max(known, key=lambda one: one["date"])
        devices[device] = [
            one for one in known if all(one.get(name) == last.get(name) for name in SETTING)
        ]
    return devices


def _table(
    goals: Sequence[Goal], head: str, devices: dict[str, list[Record]], none: str, absent: str
) -> list[Sequence[str]]:
    rows = [
        _row(goal, device, goal.find(kept), absent)
        for goal in goals
        for device, kept in (devices or {none: []}).items()
    ]
    return [("goal", head, "measured", "where it comes from"), *rows]


def _row(goal: Goal, device: str, found: Found | None, absent: str) -> Sequence[str]:
    name = f"{goal.name}: {goal.sign} {goal.bound:g}"
    if found is None:
        return name, device, absent, ""
    text = found.text
    if found.value is not None:
        met = found.value <= goal.bound if goal.sign == "≤" else found.value >= goal.bound
        text = f"{text or format(found.value, '.4g')}, {'met' if met else 'missed'}"
    where = {f"{one['date'][:10]}, commit {one['commit']}": None for one in found.source}
    return name, device, text, "; ".join(filter(None, (found.what, *where)))
