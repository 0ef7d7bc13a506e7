"""The records of the loss on a screen of 60 columns and more: a narrow table for each shape, what
its words mean, whether the machine was too noisy, and the goals that the records tell about."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from . import cpu_goals, gpu_goals, tables

# The middle half of the times of a step may span this part of their median.
NOISY = 0.10
LEAST, MOST = 60, 100
HEAD = (
    ("peer", ""),
    ("time", "ms"),
    ("", "spread"),
    ("time", "÷eager"),
    ("time", "÷floor"),
    ("peak", "MiB"),
    ("peak", "÷eager"),
    ("error", "÷eager"),
)
# Columns that are left out, in this order, where the screen is too narrow for all.
SPARE = (2, 6)
LEGEND = {
    "peer": "what is measured, ours or a baseline (docs/benchmarks.md says what each is)",
    "time": "the median of a step, which is the loss and all gradients",
    "spread": "the distance of the quartiles of the times ÷ their median",
    "eager": "the equations in plain PyTorch with autograd; below 1 is better than eager",
    "floor": "the six bare matmuls (frozen: 4, depth 3: 9), a bound for all in this dtype",
    "peak": "memory beyond the inputs at the peak of a step, with the returned gradients",
    "error": "the largest RMS error of a gradient, against float64",
}
OUTSIDE = (
    "its errors are outside the rule that ours have to keep, which is about eager's own error; "
    "that is rounding, and a wrong result gets no time"
)
OWN = "float8 is judged by a rule of its own"

Run = dict[str, dict[str, Any]]


def loss(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines to print after a run."""
    width = columns()
    runs = tables.groups(records)
    timed = [run for run in runs if any("median_ms" in entry for entry in run.values())]
    paragraphs = [table(run, width) for run in timed]
    marks = {mark: text for mark, text in (("*", OUTSIDE), ("+", OWN)) if _marked(records, mark)}
    if timed:
        paragraphs.append(wrapped((f"{k}: {v}" for k, v in (LEGEND | marks).items()), width))
    else:
        paragraphs.append(["Nothing was timed."])
    for texts in (noise(records), refusals(records), goals(records)):
        paragraphs.append(wrapped(texts, width))
    paragraphs.append(wrapped(tables.provenance(records), width))
    return "\n\n".join("\n".join(lines) for lines in paragraphs if lines).splitlines()


def table(run: Run, width: int) -> list[str]:
    """Return the table of one shape."""
    first = next(iter(run.values()))
    rows: list[Sequence[str]] = [*zip(*HEAD, strict=True)]
    for name, entry in run.items():
        if "median_ms" not in entry:
            continue
        ratio = tables.ratios(run, name)
        rows.append(
            (
                name,
                _number(entry["median_ms"], 0 if entry["median_ms"] >= 1000 else 2),
                f"{spread(entry):.0%}",
                _number(ratio["eager"]),
                _number(ratio["floor"]),
                _number(entry.get("peak_mib"), 0 if entry.get("peak_mib", 0) >= 10 else 1),
                _number(ratio["peak"]),
                _number(entry.get("error_ratio")) + _mark(entry),
            )
        )
    gap = "  " if width >= 72 else " "
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    shown = [*range(len(HEAD))]
    for column in SPARE:
        if sum(widths[c] + len(gap) for c in shown) - len(gap) > width:
            shown.remove(column)
    title = (
        f"{first['shape']} {first['dtype']}, rows by {first.get('selection', 'mask')}: "
        f"{first['n']:,} rows, widths {first['d']}→{first['m']}→{first['z']}"
    )
    lines = [
        gap.join(
            row[column].rjust(widths[column]) if column else row[0].ljust(widths[0])
            for column in shown
        ).rstrip()
        for row in rows
    ]
    return [*wrapped([title], width), "", *lines]


def spread(entry: dict[str, Any]) -> float:
    """Return the distance of the quartiles ÷ the median."""
    return float((entry["q3_ms"] - entry["q1_ms"]) / entry["median_ms"])


def noise(records: Iterable[dict[str, Any]]) -> list[str]:
    """Return a sentence if the times of a step differ too much; else nothing."""
    noisy = [entry for entry in records if "median_ms" in entry and spread(entry) > NOISY]
    if not noisy:
        return []
    worst = max(noisy, key=spread)
    others = f" (others above {NOISY:.0%}: {len(noisy) - 1})" if len(noisy) > 1 else ""
    return [
        f"Too noisy: the quartiles of {_which(worst)} {worst['peer']} are {spread(worst):.0%} of "
        f"its median apart{others}; want at most {NOISY:.0%}. Other work ran on this machine, or "
        "its clock changed. Measure again on an idle machine before you compare these times."
    ]


def refusals(records: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each reason why something was not measured."""
    peers: dict[tuple[str, str], list[str]] = {}
    for entry in records:
        for what in ("failed", "unavailable", "memory_unavailable"):
            if entry.get(what):
                why = f"{what.replace('_', ' ')}: {entry[what]}"
                peers.setdefault((_which(entry), why), []).append(entry["peer"])
    return [f"{which} {', '.join(names)}: {why}" for (which, why), names in peers.items()]


def goals(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each goal that the records tell about."""
    of_device = gpu_goals if any(entry.get("capability") for entry in records) else cpu_goals
    rows = of_device.table(records, "")[1:]
    known = [f"{goal}: measured {value} ({source})" for goal, _, value, source in rows if value]
    if not known:
        return []
    rest = len(rows) - len(known)
    more = [f"{rest} other goals need other measurements."] if rest else []
    return ["Goals that were set before anything was measured:", *known, *more]


def _which(entry: dict[str, Any]) -> str:
    return f"{entry['shape']} {entry['dtype']} {entry.get('selection', 'mask')}"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _mark(entry: dict[str, Any]) -> str:
    return "+" if entry.get("own_rule") else "*" if entry.get("outside_rule") else ""


def _marked(records: Iterable[dict[str, Any]], mark: str) -> bool:
    return any(_mark(entry) == mark for entry in records if "median_ms" in entry)


def wrapped(texts: Iterable[str], width: int | None = None) -> list[str]:
    """Return each text in lines of the width (None: of the terminal), further lines indented."""
    return [
        line
        for text in texts
        for line in textwrap.wrap(
            text,
            width or columns(),
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def columns() -> int:
    """Return the width of the terminal within bounds, or 80 where there is none."""
    return max(LEAST, min(shutil.get_terminal_size().columns, MOST))
