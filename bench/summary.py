"""A summary of a run of `bench.gpu` in at most 40 lines: a function of its records and of
check.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import record
from .gpu_goals import BLAS, KEPT, MASK
from .tables import groups, ratios

Record = dict[str, Any]

# kernels that are not passes over rows
PRODUCT = re.compile("gemm|nvjet|cutlass|xmma|matmul|weight_grad")
# × the time: a larger difference is not noise
SOONER = 0.97
UNITS = {"gb_per_s": "GB/s", "tflops": "TFLOP/s"}
HEAD = "", "ms", "÷ floor", "÷ eager", "error", "÷ formula", "host µs"


def of_folder(folder: Path) -> list[str]:
    """Return the summary of the last run that has records there."""
    records = record.load(sorted(folder.glob("*.jsonl")))
    last = max((entry["run"] for entry in records if "run" in entry), default=None)
    file = folder / "check.json"
    checked = json.loads(file.read_text()) if file.exists() else {}
    # Both dates are in UTC, and are compared to the second.
    if last and checked.get("date", "")[:19] < last[:19]:
        # The file belongs to an earlier run.
        checked = {}
    return lines(record.latest(entry for entry in records if entry.get("run") == last), checked)


def lines(records: Sequence[Record], checked: Record) -> list[str]:
    """Return the summary. A part that left no record is only listed among the parts."""
    if not records:
        return ["no records"]
    sections = [
        *_head(records),
        *_check(checked),
        *_speeds(records),
        *_tests(records),
        *_guarantees(records),
    ]
    sections += [*_lacking(records), *_kernels(records), *_tiles(records), *_workspaces(records)]
    hints = list(dict.fromkeys([*_of_check(checked), *_next(records)]))
    return [*sections, "what to try next:", *_few(hints or ["nothing: no rule applies"], 5)]


def _kind(records: Sequence[Record], *kinds: str) -> list[Record]:
    return [entry for entry in records if entry["kind"] in kinds]


def _few(texts: Sequence[str], most: int) -> list[str]:
    shown = (
        list(texts)
        if len(texts) <= most
        else [*texts[: most - 1], f"and {len(texts) - most + 1} more"]
    )
    return [f"  {text[:150]}" for text in shown]


def _head(records: Sequence[Record]) -> list[str]:
    entry = records[-1]
    names = ("device", "driver_version", "cuda", "torch", "triton", "python", "commit", "run")
    told = [", ".join(f"{name} {entry[name]}" for name in names if entry.get(name))]
    for ceiling in [entry for entry in _kind(records, "ceiling") if "failed" not in entry]:
        rate, unit = next((ceiling[key], unit) for key, unit in UNITS.items() if key in ceiling)
        told.append(f"{ceiling['item']} {rate:,.0f} {unit}")
    told[1:] = [f"ceilings: {', '.join(told[1:])}"] if told[1:] else []
    parts = _kind(records, "part")
    wrong = [
        f"{entry['item']}: {entry['outcome']}" for entry in parts if entry["outcome"] != "exit 0"
    ]
    well = f"parts: {len(parts) - len(wrong)} of {len(parts)} passed; {'; '.join(wrong)}"
    return [*told, well.rstrip("; ")[:300]]


def _check(checked: Record) -> list[str]:
    """Return a line for each implementation, with the first thing that is wrong with it."""
    results: dict[str, list[Record]] = {
        impl: [] for impl in checked.get("settings", {}).get("impl", [])
    }
    for entry in checked.get("results", []):
        results.setdefault(entry["impl"], []).append(entry)
    texts = []
    for impl, checks in results.items():
        wrong = [
            f"{entry['check']}: {entry['says']}" for entry in checks if entry["outcome"] == "fail"
        ]
        passed = sum(entry["outcome"] == "pass" for entry in checks)
        unfinished = "" if checked.get("finished") else ", ended before its end"
        line = f"check {impl}: {passed} passed, {len(wrong)} failed{unfinished}"
        texts.append("; ".join([line, *wrong[:1]]))
    return _few(texts, 3)


def _of_check(checked: Record) -> Iterator[str]:
    for entry in checked.get("results", []):
        if entry["outcome"] == "fail":
            wrong = f"{entry['check']}: {entry['says']}"
            yield f"fix {entry['impl']}, which failed the check: {wrong}"


def _lacking(records: Sequence[Record]) -> list[str]:
    """Return what was planned and not measured."""
    texts = []
    for entry in records:
        reason = entry.get("failed") or entry.get("unavailable")
        about = [str(entry[name]) for name in ("kind", "shape", "peer", "item") if name in entry]
        if reason and (entry.get("failed") or str(entry.get("peer", "ours-")).startswith("ours-")):
            texts.append(f"{' '.join(about)}: {reason}")
    return [f"not measured: {len(texts)}", *_few(texts, 2)] if texts else []


def _speeds(records: Sequence[Record]) -> list[str]:
    rows: list[Sequence[str]] = [HEAD]
    for run in groups(_kind(records, "loss", "hot")):
        for name, entry in run.items():
            if not name.startswith(("ours-", "compile")) or entry.get("unavailable"):
                continue
            about = (
                f"{entry['shape']} {entry['selection']}{' hot' * (entry['kind'] == 'hot')} {name}"
            )
            if entry.get("failed"):
                rows.append((about, entry["failed"][:60]))
                continue
            ratio = ratios(run, name)
            metrics = [
                entry.get("median_ms"),
                ratio["floor"],
                ratio["eager"],
                entry.get("error_ratio"),
                _memory(entry),
            ]
            texts = ["" if metric is None else f"{metric:.3f}" for metric in metrics]
            host = entry.get("enqueue_us")
            rows.append((about, *texts, "" if host is None else f"{host:.0f}"))
    if len(rows) == 1:
        return []
    first = max(len(row[0]) for row in rows)
    return _few(
        [row[0].ljust(first) + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows], 11
    )


def _memory(entry: Record) -> float | None:
    """Return the peak beyond the returned gradients ÷ the formula."""
    if "peak_mib" not in entry or "formula_mib" not in entry:
        return None
    return (entry["peak_mib"] - entry["returned_mib"]) / entry["formula_mib"]


def _tests(records: Sequence[Record]) -> list[str]:
    tests = _kind(records, "test")
    failed = [entry for entry in tests if entry["outcome"] == "failed"]
    passed = sum(entry["outcome"] == "passed" for entry in tests)
    if not tests:
        return []
    names = [
        f"{entry['item'].removeprefix('tests/')}: {_last(entry.get('message', ''))}"
        for entry in failed
    ]
    return [f"tests: {passed} passed, {len(failed)} failed", *_few(names, 2)]


def _last(text: str) -> str:
    """Return the last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _broken(records: Sequence[Record]) -> list[str]:
    return [
        f"{entry['kind']}, {entry['peer']}, {entry['item']}: {entry['outcome']}"
        for entry in _kind(records, *KEPT)
        if entry["outcome"] != KEPT[entry["kind"]]
    ]


def _guarantees(records: Sequence[Record]) -> list[str]:
    calls = _kind(records, *KEPT)
    broken = _broken(records)
    kept = f"guarantees: {len(calls) - len(broken)} of {len(calls)} kept"
    return [kept, *_few(broken, 2)] if calls else []


def _slowest(records: Sequence[Record], name: str, passes: bool = False) -> list[str]:
    """Return the slowest kernels of a step, and the slowest of its passes over rows."""
    of_baseline = [entry for entry in _kind(records, "kernel") if entry["peer"] == name]
    shown = [entry for entry in of_baseline if not (passes and PRODUCT.search(entry["item"]))]
    shown.sort(key=lambda entry: -entry["us"])
    return [f"{entry['item'][:40]} {entry['us']:.0f} µs" for entry in shown[:3]]


def _kernels(records: Sequence[Record]) -> list[str]:
    names = dict.fromkeys(
        entry["peer"] for entry in _kind(records, "kernel") if entry["peer"].startswith("ours-")
    )
    return [f"slowest of {name}: {', '.join(_slowest(records, name))}" for name in list(names)[:3]]


def _candidates(records: Sequence[Record]) -> Iterator[tuple[str, Record, Record]]:
    """Return (role, shipped tile, best tile) where both were timed."""
    timed = [entry for entry in _kind(records, "tile") if "median_ms" in entry]
    for role in dict.fromkeys(entry["role"] for entry in timed):
        tiles = [entry for entry in timed if entry["role"] == role]
        best = min(tiles, key=lambda entry: entry["median_ms"])
        for shipped in [
            entry for entry in tiles if entry["in_use"] and entry["kernel"] == best["kernel"]
        ][:1]:
            yield role, shipped, best


def _tiles(records: Sequence[Record]) -> list[str]:
    texts = []
    for role, shipped, best in _candidates(records):
        pair = [
            f"{tuple(entry['tile'])} {entry['over_blas']:.3f} × cuBLAS's time"
            for entry in (shipped, best)
        ]
        texts.append(f"tile of {role}: shipped {pair[0]}, best {pair[1]}")
    return texts[:2]


def _workspace_runs(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Return time ÷ floor by MiB, for each of ours."""
    runs: dict[str, dict[int, float]] = {}
    for entry in _kind(records, "workspace"):
        if "over_floor" in entry and "item" in entry:
            runs.setdefault(entry["peer"], {})[entry["item"]] = entry["over_floor"]
    return runs


def _workspaces(records: Sequence[Record]) -> list[str]:
    texts = []
    for name, sizes in _workspace_runs(records).items():
        curve = ", ".join(f"{mib} MiB {ratio:.3f}" for mib, ratio in sorted(sizes.items()))
        texts.append(
            f"workspace of {name}, ÷ floor: {curve}; best {min(sizes, key=lambda mib: sizes[mib])}"
        )
    return texts[:2]


def _next(records: Sequence[Record]) -> Iterator[str]:
    """Return suggestions that follow from the results by simple rules, the most serious first."""
    if failed := [entry for entry in _kind(records, "test") if entry["outcome"] == "failed"]:
        yield f"fix {failed[0]['item']} and {len(failed) - 1} more: no number counts until then"
    yield from (f"fix {text}" for text in _broken(records)[:1])
    for run in groups(_kind(records, "loss")):
        yield from _of_run(run, records)
    for role, shipped, best in _candidates(records):
        if best["median_ms"] < SOONER * shipped["median_ms"]:
            gain = 1 - best["median_ms"] / shipped["median_ms"]
            less = f"{gain:.0%} less time than the shipped one"
            yield f"put {best['item']} into the table of tiles: {less}"
        elif shipped["over_blas"] > 1.1:
            times = f"{best['over_blas']:.2f} × its time"
            yield f"{role}: no candidate is near cuBLAS ({times}): the kernel, not its tile"
    for name, sizes in _workspace_runs(records).items():
        best = min(sizes, key=lambda mib: sizes[mib])
        if 512 in sizes and sizes[best] < SOONER * sizes[512]:
            gain = 1 - sizes[best] / sizes[512]
            yield f"{name}: {best} MiB of workspace by default, {gain:.0%} less time than 512"
    for entry in _kind(records, "part"):
        if entry["outcome"] == "ended at its limit":
            limit = f"{entry['item']} took more than its {entry['seconds']:.0f} s"
            yield f"{limit}: the end of log.txt's part says where"


def _of_run(run: dict[str, Record], records: Sequence[Record]) -> Iterator[str]:
    """Return suggestions that follow from the baselines of a shape that were measured side by
    side."""
    timed = {name: entry for name, entry in run.items() if "median_ms" in entry}
    ours = {name: entry for name, entry in timed.items() if name.startswith("ours-")}
    for name, entry in run.items():
        if name.startswith("ours-") and entry.get("failed"):
            yield f"fix {name} at {entry['shape']}, {entry['selection']}: {entry['failed']}"
    for name, entry in ours.items():
        where = f"{name} at {entry['shape']}, {entry['selection']}"
        over = ratios(run, name)["floor"]
        goal = {"ours-blas": BLAS, "ours-triton": MASK}.get(name)
        if entry.get("enqueue_us", 0.0) > 900 * entry["median_ms"]:
            host = f"{entry['enqueue_us']:.0f} µs a step"
            yield f"{where}: the host needs {host}: fewer launches, or a CUDA graph"
        elif goal and over and over > goal:
            slowest = ", ".join(_slowest(records, name, passes=True)) or "not known"
            yield f"{where}: {over:.2f} × the floor > {goal:g}; the slowest passes: {slowest}"
        if (memory := _memory(entry)) and memory > 1.0:
            much = f"{memory:.2f} × the formula's memory"
            yield f"{where}: {much}: what is allocated beside the workspace?"
    same = [ratios(run, name)["eager"] or math.inf for name in ours if name != "ours-fp8"]
    for name, entry in timed.items():
        if name.startswith("compile") and (ratios(run, name)["eager"] or math.inf) < min(
            same, default=0.0
        ):
            where = f"{name} is faster than ours at {entry['shape']}"
            yield f"{where}: compare their kernels (--stage profile)"
    fp8, blas = (ratios(run, name)["floor"] for name in ("ours-fp8", "ours-blas"))
    if fp8 and blas and fp8 > blas:
        yield (
            f"fp8 gains nothing: {fp8:.2f} against {blas:.2f} × the floor; "
            "its quantisation, or _scaled_mm itself"
        )
