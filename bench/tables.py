"""Records as tables: the loss and its baselines, any other kind of record, and where the numbers
come from. All modules that show records use this one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pre_kernels.diagnostics.report.statistics import interval, spread

from . import record

HEAD = (
    "shape", "N · d→m→z", "dtype", "rows", "peer", "ms (quartiles)", "TFLOP/s", "÷ eager",
    "÷ floor", "peak MiB", "÷ eager", "less gradients, ÷ eager", "error ÷ eager",
)  # fmt: skip


def groups(records: Iterable[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Return records by baseline, for each run of a shape."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in records:
        runs.setdefault(entry["group"], {})[entry["peer"]] = entry
    return list(runs.values())


def over_floor(run: dict[str, dict[str, Any]], name: str) -> float | None:
    """Return a baseline's time ÷ that of the six bare matmuls that were sampled beside it."""
    entry = run.get(name, {})
    floor = entry.get("floor_ms", run.get("floor", {}).get("median_ms"))
    return entry["median_ms"] / floor if floor and "median_ms" in entry else None


def ratios(run: dict[str, dict[str, Any]], name: str) -> dict[str, float | None]:
    """Return a baseline's time ÷ eager's and ÷ the floor's, and its peak memory ÷ eager's, with and
    without gradients. Times of different processes are compared by the floor beside each."""
    over, eager = over_floor(run, name), over_floor(run, "eager")

    def of(which: str, *fields: str) -> float | None:
        values = [run.get(which, {}).get(field) for field in fields]
        if any(value is None for value in values):
            return None
        return values[0] - sum(values[1:])

    def ratio(other: str, *fields: str) -> float | None:
        ours, theirs = of(name, *fields), of(other, *fields)
        return ours / theirs if ours is not None and theirs else None

    return {
        "eager": over / eager if over and eager else ratio("eager", "median_ms"),
        "floor": over,
        "peak": ratio("eager", "peak_mib"),
        "extra": ratio("eager", "peak_mib", "returned_mib"),
    }


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def loss_table(records: Iterable[dict[str, Any]]) -> list[Sequence[str]]:
    """Return header and rows. A baseline without times is left out (see `refusals`)."""
    table: list[Sequence[str]] = [HEAD]
    for run in groups(records):
        for name, entry in run.items():
            if "median_ms" not in entry:
                continue
            ratio = ratios(run, name)
            digits = 3 if entry["median_ms"] < 100 else 0
            time = [_number(entry[key], digits) for key in ("median_ms", "q1_ms", "q3_ms")]
            table.append(
                (
                    entry["shape"],
                    f"{entry['n']:,} · {entry['d']}→{entry['m']}→{entry['z']}",
                    entry["dtype"],
                    entry.get("selection", "mask"),
                    name,
                    f"{time[0]} ({time[1]}–{time[2]})",
                    _number(entry["tflops"], 1 if entry["tflops"] >= 10 else 2),
                    _number(ratio["eager"]),
                    _number(ratio["floor"]),
                    _number(entry.get("peak_mib"), 0),
                    _number(ratio["peak"]),
                    _number(ratio["extra"]),
                    _number(entry.get("error_ratio")) + _rule(entry),
                )
            )
    return table


def _rule(entry: dict[str, Any]) -> str:
    if entry.get("own_rule"):
        return ", own rule"
    return ", outside the rule" if entry.get("outside_rule") else ""


def refusals(records: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each measurement that was not taken, with the reason."""
    lines = []
    for entry in records:
        for what in ("failed", "unavailable", "memory_unavailable", "outside_rule"):
            if entry.get(what):
                which = f"{entry['shape']} {entry['dtype']} {entry['peer']}"
                lines.append(f"{which}: {what.replace('_', ' ')}: {entry[what]}")
    return lines


def plain_table(records: list[dict[str, Any]]) -> list[Sequence[str]]:
    """Return a table of records of any other kind: a column for each field that differs between
    them, without lists and stamps."""
    hidden = {
        "kind",
        "group",
        "date",
        "commit",
        "source",
        "measured",
        "power.draw",
        "temperature.gpu",
        "clocks.sm",
    }
    names = dict.fromkeys(
        name
        for entry in records
        for name, value in entry.items()
        if not isinstance(value, list | dict)
    )
    shown = [
        name
        for name in names
        if name not in hidden and len({str(entry.get(name)) for entry in records}) > 1
    ]

    def text(value: Any) -> str:
        return (
            _number(value, 3) if isinstance(value, float) else "" if value is None else str(value)
        )

    return [shown, *([text(entry.get(name)) for name in shown] for entry in records)]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose source is aligned too."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def below(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the lines below a table: where its numbers come from, and whether the code has changed
    since."""
    records = list(records)
    lines = [f"- {line}" for line in provenance(records)]
    return "\n".join([*lines, *(("", line) if (line := outdated(records)) else ())])


def outdated(records: Iterable[Mapping[str, Any]]) -> str:
    """Return a sentence about the records whose code has changed since; empty if there are none."""
    dates: dict[str, set[str]] = {}
    for entry in record.changed(records):
        dates.setdefault(entry["commit"], set()).add(entry["date"][:10])
    if not dates:
        return ""
    at = [f"commit {commit}, on {' and '.join(sorted(days))}" for commit, days in dates.items()]
    return f"The code has changed since: measured at {'; '.join(at)}."


def provenance(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each device, version and commit that the numbers come from."""
    lines = {}
    for entry in records:
        extras = [f"driver {entry['driver_version']}"] if entry.get("driver_version") else []
        threads = entry.get("threads")
        extras += [f"{threads} thread{'s' * (threads > 1)}"] if threads else []
        parts = [entry["device"], *extras, f"torch {entry['torch']}", f"triton {entry['triton']}"]
        lines[", ".join([*parts, entry["date"][:10], f"commit {entry['commit']}"])] = None
    return list(lines)


def claim(text: str, changes: Sequence[float]) -> str:
    """A sentence: is the difference, which the finding says is positive, positive in these seeds
    beyond the noise between them?"""
    low, high = interval(changes)
    verdict = (
        "reproduced" if low > 0 else "the opposite" if high < 0 else "not shown, within the noise"
    )
    above = sum(change > 0 for change in changes)
    return (
        f"{text}: {verdict} ({spread(changes, '+')}, positive in {above} of {len(changes)} seeds; "
        f"95 % interval {low:+.3f} to {high:+.3f})."
    )
