"""The results of mutation testing (`bench/mutate.py`), as result lines and as the table of its
page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .tables import below, markdown

OPERATORS = ("sign", "index", "mask", "scale", "chunk")
SURVIVED = ("equivalent", "gap", "unreached", "survived")


def aggregate(
    outcomes: Iterable[Mapping[str, Any]], named: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Return a line for each file. An outcome has key, short, file, operator, outcome, and the test
    that failed. `named` has the reasons of mutants, by "equivalent" and "gap"."""
    files: dict[str, list[Mapping[str, Any]]] = {}
    for entry in outcomes:
        files.setdefault(entry["file"], []).append(entry)
    lines = []
    for file, members in sorted(files.items()):
        counts = {operator: Counter[str]() for operator in OPERATORS}
        killers = defaultdict[str, list[str]](list)
        survivors = []
        for entry in members:
            outcome = entry["outcome"]
            reason = ""
            if outcome in SURVIVED:
                for kind, reasons in named.items():
                    if entry["key"] in reasons:
                        outcome = kind
                        reason = reasons[entry["key"]]
                survivors.append({"mutant": entry["key"], "outcome": outcome, "reason": reason})
            elif entry["test"]:
                killers[entry["test"]].append(entry["short"])
            counts[entry["operator"]][outcome] += 1
        lines.append(
            {
                "item": file,
                "mutants": len(members),
                "operators": {operator: dict(each) for operator, each in counts.items()},
                "survivors": sorted(survivors, key=lambda entry: entry["mutant"]),
                "killers": {test: sorted(keys) for test, keys in sorted(killers.items())},
            }
        )
    return lines


def last(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines of the last campaign."""
    records = [entry for entry in records if entry["kind"] == "mutation"]
    date = max((entry["date"] for entry in records), default="")
    return [entry for entry in records if entry["date"] == date]


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page's text: a row for each file, the rates, and the survivors."""
    records = last(records)
    if not records:
        return "No results yet."
    rows: list[Sequence[str]] = [
        ("file", "mutants", *OPERATORS, "timeouts", "equivalent", "survived")
    ]
    for entry in (*records, {"item": "all", "operators": _sum(records)}):
        counts = {operator: entry["operators"].get(operator, {}) for operator in OPERATORS}
        total = sum(map(Counter, counts.values()), Counter[str]())
        alive = sum(total[name] for name in SURVIVED)
        cells = [
            f"{_killed(each)}/{sum(each.values())}" if each else "" for each in counts.values()
        ]
        others = (total["timeout"], total["equivalent"], alive - total["equivalent"])
        rows.append((entry["item"], f"{sum(total.values()):,}", *cells, *map(str, others)))
    return "\n".join([markdown(rows), "", _summary(records), "", below(records), *_named(records)])


def _sum(records: Iterable[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    total = {operator: Counter[str]() for operator in OPERATORS}
    for entry in records:
        for operator, each in entry["operators"].items():
            total[operator].update(each)
    return total


def _killed(each: Mapping[str, int]) -> int:
    return sum(number for outcome, number in each.items() if outcome not in SURVIVED)


def _summary(records: Sequence[Mapping[str, Any]]) -> str:
    total = sum(_sum(records).values(), Counter[str]())
    number = sum(total.values())
    killed = _killed(total)
    drawn = (
        "every mutant" if records[0]["drawn"] is None else f"a sample of seed {records[0]['seed']}"
    )
    ways = ", ".join(f"{total[name]:,} {text}" for name, text in (
        ("timeout", "by a timeout"), ("crash", "by the end of the process"),
        ("invalid", "by failing to import"),
    ) if total[name])  # fmt: skip
    return (
        f"{number:,} mutants ({drawn}): {killed:,} killed ({ways}), {100 * killed / number:.1f} %; "
        f"{100 * killed / (number - total['equivalent']):.1f} % of those that are not equivalent. "
        f"A cell of an operator holds killed/mutants."
    )


def _named(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the survivors by their reason."""
    reasons = defaultdict[tuple[str, str], list[str]](list)
    for record in records:
        for entry in record["survivors"]:
            reasons[entry["outcome"], entry["reason"]].append(entry["mutant"])
    lines = ["", "## The survivors"]
    for (outcome, reason), mutants in sorted(reasons.items()):
        about = f"{outcome}{': ' if reason else ''}{reason}"
        lines += ["", about, "", *(f"    {mutant}" for mutant in mutants)]
    return lines if reasons else []
