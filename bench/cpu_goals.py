"""The goals on a CPU, and what was measured for each. Every number comes from records; where there
are none, the table says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from . import goals
from .goals import ABSENT, Finding, Goal, Record, fastest_of_ours, field, having, runs

SHAPES = ("cpu-16k", "cpu-4k-encoder")
SMALL = "cpu-small"
MODES = ("compile", "compile-max")
VLM = "smolvlm-256m"
# No goal uses other records of a CPU, and their numbers of threads differ.
KINDS = ("loss", "workspace", "training")
A_CPU = "a CPU"


def milliseconds(entry: Record) -> float | None:
    return entry["median_ms"]


def extra(entry: Record) -> float | None:
    """Return the peak MiB beyond the returned gradients."""
    return entry["peak_mib"] - entry["returned_mib"] if "peak_mib" in entry else None


def over(
    others: Sequence[str],
    metric: Callable[[Record], float | None],
    dtypes: Sequence[str],
    names: Sequence[str],
    records: list[Record],
) -> Finding | None:
    """Return a metric of ours ÷ the smallest of some baselines in the same run: the worst over the
    shapes of `names`, over the ways to give rows, and over `dtypes`."""
    findings: list[Finding] = []
    for run in runs(records, kind="loss"):
        ours = fastest_of_ours(run)
        if ours is None or ours["shape"] not in names or ours["dtype"] not in dtypes:
            continue
        own = metric(ours)
        known = {name: value for name in others if name in run and (value := metric(run[name]))}
        if own is not None and known:
            least = min(known, key=lambda name: known[name])
            what = (
                f"{ours['shape']} {ours['dtype']} {ours.get('selection', 'mask')}, beside {least}"
            )
            findings.append(Finding(own / known[least], "", [ours], what))
    return _worst(findings)


def _worst(findings: Sequence[Finding]) -> Finding | None:
    worst = max(findings, key=lambda finding: finding.value or 0.0, default=None)
    if worst is None or len(findings) == 1:
        return worst
    return worst._replace(what=f"{worst.what}, the worst of {len(findings)}")


def small_memory(dtype: str, records: list[Record]) -> Finding | None:
    """Return the extra peak of the workspace that takes the least, ÷ eager's in the same sweep: the
    worst of the shapes."""
    sweeps: dict[str, list[Record]] = {}
    for entry in having(records, kind="workspace", dtype=dtype):
        if entry["shape"] in SHAPES and "peak_mib" in entry:
            sweeps.setdefault(entry["group"], []).append(entry)
    findings = []
    for sweep in sweeps.values():
        eager = next((extra(entry) for entry in sweep if entry["peer"] == "eager"), None)
        ours = min(
            (entry for entry in sweep if "item" in entry),
            key=lambda entry: extra(entry) or 0.0,
            default=None,
        )
        if eager and ours:
            time = f"{ours['over_floor']:.2f} × the floor's time"
            what = f"{ours['shape']} {dtype}, {ours['item']} MiB: {time}"
            findings.append(Finding((extra(ours) or 0.0) / eager, "", [ours], what))
    return _worst(findings)


def outside(records: list[Record]) -> Finding | None:
    """Return how many runs of ours broke the error rule. Such runs have no time either."""
    judged = [
        entry
        for entry in having(records, kind="loss")
        if entry["shape"] in (*SHAPES, SMALL)
        and entry["peer"].startswith("ours-")
        and ("failed" in entry or "error_ratio" in entry)
    ]
    broken = [entry for entry in judged if entry.get("failed") or entry.get("outside_rule")]
    where = [
        f"{entry['shape']} {entry['dtype']} {entry.get('selection', 'mask')}" for entry in broken
    ]
    text = f"{len(broken)} of {len(judged)} runs"
    return Finding(len(broken), text, broken or judged, "; ".join(where)) if judged else None


def _ratio(
    others: Sequence[str],
    metric: Callable[[Record], float | None],
    *dtypes: str,
    names: Sequence[str] = SHAPES,
) -> Callable[[list[Record]], Finding | None]:
    return partial(over, others, metric, dtypes, names)


def _training(ratio: str) -> Callable[[list[Record]], Finding | None]:
    return partial(field, "training", ratio, item=VLM)


def _of_dtype(dtype: str, over_compiled: float) -> list[Goal]:
    of_compiled = _ratio(MODES, milliseconds, dtype)
    small = partial(small_memory, dtype)
    return [
        Goal(f"{dtype}: time ÷ the best of torch.compile", "≤", over_compiled, of_compiled),
        Goal(f"{dtype}: time ÷ eager", "≤", 0.60, _ratio(("eager",), milliseconds, dtype)),
        Goal(f"{dtype}: extra peak ÷ torch.compile's", "≤", 1.0, _ratio(MODES, extra, dtype)),
        Goal(f"{dtype}: extra peak ÷ eager's, a small workspace", "≤", 0.20, small),
    ]


TINY = _ratio(("eager",), milliseconds, "bf16", "fp32", names=(SMALL,))
GOALS = [
    *_of_dtype("bf16", 0.95),
    *_of_dtype("fp32", 0.85),
    Goal("fp16: time ÷ eager", "≤", 1.0, _ratio(("eager",), milliseconds, "fp16")),
    Goal("N = 64, widths of 64: time ÷ eager", "≤", 1.5, TINY),
    Goal("runs outside the error rule", "≤", 0, outside),
    Goal("training step of SmolVLM-256M, time", "≤", 1.02, _training("time_ratio")),
    Goal("training step of SmolVLM-256M, memory", "≤", 1.02, _training("memory_ratio")),
]


def table(records: Iterable[Record], absent: str = ABSENT) -> list[Sequence[str]]:
    """Return the header and a row for each goal and CPU, from the records with its last versions
    and number of threads. `absent` fills the cell of a goal without records."""
    of_cpus = goals.by_device(
        entry for entry in records if not entry.get("capability") and entry["kind"] in KINDS
    )
    return goals.table(GOALS, "CPU", of_cpus, A_CPU, absent)
