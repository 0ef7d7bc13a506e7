"""A goal, its finding in the records, and the table of both. The goals on a GPU (`gpu_goals`) and
on a CPU (`cpu_goals`) share this module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

SETTING = ("torch", "triton", "threads")
ABSENT = "not yet measured"

Record = dict[str, Any]


class Finding(NamedTuple):
    # Is compared with the bound. None where `text` says what is wrong.
    value: float | None
    text: str
    # the records that it comes from
    source: Sequence[Record]
    # which baseline, shape, ...
    what: str = ""


class Goal(NamedTuple):
    name: str
    sign: str  # "≤" or "≥"
    bound: float
    find: Callable[[list[Record]], Finding | None]


def having(records: Iterable[Record], **fields: Any) -> list[Record]:
    """Return the records with these values."""
    return [
        entry
        for entry in records
        if all(entry.get(name) == value for name, value in fields.items())
    ]


def runs(records: Iterable[Record], **fields: Any) -> list[dict[str, Record]]:
    """Return the timed records of the loss by baseline, for each run that has these fields."""
    by_group: dict[str, dict[str, Record]] = {}
    for entry in having(records, **fields):
        if "median_ms" in entry:
            by_group.setdefault(entry["group"], {})[entry["peer"]] = entry
    return list(by_group.values())


def fastest_of_ours(run: dict[str, Record]) -> Record | None:
    """Return the fastest of ours, without fp8."""
    times = [
        entry for name, entry in run.items() if name.startswith("ours-") and name != "ours-fp8"
    ]
    return min(times, key=lambda entry: entry["median_ms"], default=None)


def field(kind: str, name: str, records: list[Record], **fields: Any) -> Finding | None:
    """Return the worst (largest) value of a field over the baselines."""
    kept = having(records, kind=kind, **fields)
    worst = max(
        (entry for entry in kept if entry.get(name) is not None),
        key=lambda entry: entry[name],
        default=None,
    )
    failed = next((entry for entry in kept if "failed" in entry), None)
    if failed:
        return Finding(None, "failed", [failed], failed["failed"])
    return worst and Finding(worst[name], "", [worst], worst.get("peer", worst.get("item", "")))


def by_device(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return, for each device, the records with the same setting as its last record."""
    devices: dict[str, list[Record]] = {}
    for entry in records:
        devices.setdefault(entry["device"], []).append(entry)
    for device, known in devices.items():
        last = max(known, key=lambda entry: entry["date"])
        devices[device] = [
            entry for entry in known if all(entry.get(name) == last.get(name) for name in SETTING)
        ]
    return devices


def table(
    goals: Sequence[Goal], head: str, devices: dict[str, list[Record]], none: str, absent: str
) -> list[Sequence[str]]:
    rows = [
        _row(goal, device, goal.find(kept), absent)
        for goal in goals
        for device, kept in (devices or {none: []}).items()
    ]
    return [("goal", head, "measured", "where it comes from"), *rows]


def _row(goal: Goal, device: str, finding: Finding | None, absent: str) -> Sequence[str]:
    name = f"{goal.name}: {goal.sign} {goal.bound:g}"
    if finding is None:
        return name, device, absent, ""
    text = finding.text
    if finding.value is not None:
        met = finding.value <= goal.bound if goal.sign == "≤" else finding.value >= goal.bound
        text = f"{text or format(finding.value, '.4g')}, {'met' if met else 'missed'}"
    where = {f"{entry['date'][:10]}, commit {entry['commit']}": None for entry in finding.source}
    return name, device, text, "; ".join(filter(None, (finding.what, *where)))
