"""The results of a fuzz campaign, as result lines and as the table of its page. This module reads
outcomes and does not need hypothesis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from .tables import below, markdown

TENSORS = {"loss": "loss", "hidden": "dH", "w1": "dW1", "b1": "db1", "w2": "dW2", "b2": "db2"}
TENSORS |= {"w3": "dW3", "b3": "db3", "norm_weight": "dscale", "norm_bias": "dshift"}
GROUP = ("impl", "dtype", "loss", "activation")
VERDICTS = ("within", "overflow", "luck", "violation")


def aggregate(cases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for each implementation, dtype of the matmuls, loss and activation. A case has
    the fields of its group, `spec`, and `outcomes`, each of (tensor, verdict, error, eager's error,
    what the rule allows besides, whether eager is outside the rule against ours, message)."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault(tuple(case[name] for name in GROUP), []).append(case)
    lines = []
    for key, members in sorted(groups.items()):
        failed = [
            {"tensor": name, "message": message, "spec": case["spec"]}
            for case in members
            for name, verdict, *_, message in case["outcomes"]
            if verdict == "violation"
        ]
        tensors = {
            new: metrics
            for old, new in TENSORS.items()
            if (metrics := _metrics(entry for entry in _of(members, old)))
        }
        group = dict(zip(GROUP, key, strict=True))
        item = f"{group['impl']} {group['loss']} {group['activation']}"
        lines.append(
            {"item": item, **group, "cases": len(members), "tensors": tensors, "violations": failed}
        )
    return lines


def _of(members: Iterable[dict[str, Any]], name: str) -> Iterable[Sequence[Any]]:
    return (outcome for case in members for outcome in case["outcomes"] if outcome[0] == name)


def _metrics(outcomes: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Return the metrics of one tensor; empty if no case asked for it."""
    outcomes = list(outcomes)
    if not outcomes:
        return {}
    ratios = [error / eager for _, _, error, eager, *_ in outcomes if eager and eager > 0]
    # Where eager is exact by chance, its error is not a measure, so the rule's own bound is used.
    bounded = [
        error / max(eager, allowed)
        for _, _, error, eager, allowed, *_ in outcomes
        if allowed is not None and max(eager, allowed) > 0
    ]
    verdicts = {name: sum(entry[1] == name for entry in outcomes) for name in VERDICTS}
    return {
        "cases": len(outcomes),
        "median": _rounded(median(ratios)) if ratios else None,
        "largest": _rounded(max(ratios)) if ratios else None,
        "largest_bounded": _rounded(max(bounded)) if bounded else None,
        **verdicts,
        "turned": sum(entry[5] for entry in outcomes),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def page(records: Sequence[dict[str, Any]]) -> str:
    """Return the page's text about the last campaign: rows by implementation, dtype and loss, and
    then by activation too."""
    records = [entry for entry in records if entry["kind"] == "fuzz"]
    if not records:
        return "No results yet."
    last = max(records, key=lambda entry: entry["date"])
    records = [
        entry for entry in records if (entry["seed"], entry["date"]) == (last["seed"], last["date"])
    ]
    by_activation = ["## By activation", "", _table(records, GROUP)]
    return "\n".join(
        [_table(records, GROUP[:3]), "", _summary(records), "", below(records), "", *by_activation]
    )


def _table(records: Sequence[dict[str, Any]], by: Sequence[str]) -> str:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for entry in records:
        groups.setdefault(tuple(entry[name] for name in by), []).append(entry)
    # An old campaign had no third layer and no norm.
    names = [
        name for name in TENSORS.values() if any(name in entry["tensors"] for entry in records)
    ]
    rows: list[Sequence[str]] = [("implementation", *by[1:], "cases", *names)]
    for key, members in groups.items():
        cells = [
            _cell([entry["tensors"][name] for entry in members if name in entry["tensors"]])
            for name in names
        ]
        rows.append((*key, f"{sum(entry['cases'] for entry in members):,}", *cells))
    return markdown(rows)


def _cell(metrics: Sequence[dict[str, Any]]) -> str:
    weighed = [
        (entry["median"], entry["cases"]) for entry in metrics if entry["median"] is not None
    ]
    worst = [entry["largest_bounded"] for entry in metrics if entry["largest_bounded"] is not None]
    if not weighed or not worst:
        return ""
    middle = sum(value * cases for value, cases in weighed) / sum(cases for _, cases in weighed)
    return f"{middle:.2f} · {max(worst):.2f}"


def _summary(records: Sequence[dict[str, Any]]) -> str:
    metrics = [entry for record in records for entry in record["tensors"].values()]
    count = {name: sum(entry[name] for entry in metrics) for name in (*VERDICTS, "turned")}
    total = sum(entry["cases"] for entry in metrics)
    failed = sum(len(entry["violations"]) for entry in records)
    cases = sum(entry["cases"] for entry in records)
    return (
        f"The campaign of seed {records[0]['seed']} had {cases:,} distinct cases with {total:,} "
        f"tensors. {count['within']:,} tensors are within the rule. In {count['overflow']:,} eager "
        f"overflows or is about to. In {count['luck']:,} eager's own error is small by luck, and "
        f"the rule holds over an ensemble of neighbouring cases. {failed:,} violate the rule. With "
        f"the roles exchanged, eager is outside the rule in {count['turned']:,}.\n\nA cell holds "
        "the error ÷ eager's error: the median · the largest. For the largest, eager's error "
        "counts as at least what the rule allows in any case. The exact values are computed in "
        "float64, and for float64 inputs in 80-bit floats."
    )


def plain(value: float) -> float | None:
    """Return the value, or None for nan and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
