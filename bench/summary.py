"""What a run of `bench.gpu` found, in at most 40 lines: a function of the records that it left, and
of check.json."""

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

# kernels that are no pass over rows
PRODUCT = re.compile("gemm|nvjet|cutlass|xmma|matmul|weight_grad")
# × the time: from here on a difference is no accident
SOONER = 0.97
UNITS = {"gb_per_s": "GB/s", "tflops": "TFLOP/s"}
HEAD = "", "ms", "÷ floor", "÷ eager", "error", "÷ formula", "host µs"


def of_folder(folder: Path) -> list[str]:
    """Of the last run whose records are there."""
    records = record.load(sorted(folder.glob("*.jsonl")))
    last = max((one["run"] for one in records if "run" in one), default=None)
    file = folder / "check.json"
    checked = json.loads(file.read_text()) if file.exists() else {}
    # Both dates are in UTC; they are compared to the second.
    if last and checked.get("date", "")[:19] < last[:19]:
        # The file is of an earlier run.
        checked = {}
    return lines(record.latest(one for one in records if one.get("run") == last), checked)


def lines(records: Sequence[Record], checked: Record) -> list[str]:
    """The summary; a part that left no record has no line but among the parts."""
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
    return [*sections, "what to try next:", *_few(hints or ["nothing that these rules know of"], 5)]


def _kind(records: Sequence[Record], *kinds: str) -> list[Record]:
    return [one for one in records if one["kind"] in kinds]


def _few(texts: Sequence[str], most: int) -> list[str]:
    shown = (
        list(texts)
        if len(texts) <= most
        else [*texts[: most - 1], f"and {len(texts) - most + 1} more"]
    )
    return [f"  {text[:150]}" for text in shown]


def _head(records: Sequence[Record]) -> list[str]:
    one = records[-1]
    names = ("device", "driver_version", "cuda", "torch", "triton", "python", "commit", "run")
    told = [", ".join(f"{name} {one[name]}" for name in names if one.get(name))]
    for ceiling in [one for one in _kind(records, "ceiling") if "failed" not in one]:
        rate, unit = next((ceiling[key], unit) for key, unit in UNITS.items() if key in ceiling)
        told.append(f"{ceiling['item']} {rate:,.0f} {unit}")
    told[1:] = [f"ceilings: {', '.join(told[1:])}"] if told[1:] else []
    parts = _kind(records, "part")
    wrong = [f"{one['item']}: {one['outcome']}" for one in parts if one["outcome"] != "exit 0"]
    well = f"parts: {len(parts) - len(wrong)} of {len(parts)} well; {'; '.join(wrong)}"
    return [*told, well.rstrip("; ")[:300]]


def _check(checked: Record) -> list[str]:
    """A line for each implementation, with the first thing that is wrong with it."""
    results: dict[str, list[Record]] = {
        impl: [] for impl in checked.get("settings", {}).get("impl", [])
    }
    for one in checked.get("results", []):
        results.setdefault(one["impl"], []).append(one)
    texts = []
    for impl, checks in results.items():
        wrong = [f"{one['check']}: {one['says']}" for one in checks if one["outcome"] == "fail"]
        passed = sum(one["outcome"] == "pass" for one in checks)
        unfinished = "" if checked.get("finished") else ", ended before its end"
        line = f"check {impl}: {passed} passed, {len(wrong)} failed{unfinished}"
        texts.append("; ".join([line, *wrong[:1]]))
    return _few(texts, 3)


def _of_check(checked: Record) -> Iterator[str]:
    for one in checked.get("results", []):
        if one["outcome"] == "fail":
            yield f"mend {one['impl']}, which check found wrong: {one['check']}: {one['says']}"


def _lacking(records: Sequence[Record]) -> list[str]:
    """What was to be measured and was not."""
    texts = []
    for one in records:
        reason = one.get("failed") or one.get("unavailable")
        about = [str(one[name]) for name in ("kind", "shape", "peer", "item") if name in one]
        if reason and (one.get("failed") or str(one.get("peer", "ours-")).startswith("ours-")):
            texts.append(f"{' '.join(about)}: {reason}")
    return [f"not measured: {len(texts)}", *_few(texts, 2)] if texts else []


def _speeds(records: Sequence[Record]) -> list[str]:
    rows: list[Sequence[str]] = [HEAD]
    for run in groups(_kind(records, "loss", "hot")):
        for name, one in run.items():
            if not name.startswith(("ours-", "compile")) or one.get("unavailable"):
                continue
            about = f"{one['shape']} {one['selection']}{' hot' * (one['kind'] == 'hot')} {name}"
            if one.get("failed"):
                rows.append((about, one["failed"][:60]))
                continue
            ratio = ratios(run, name)
            metrics = [
                one.get("median_ms"),
                ratio["floor"],
                ratio["eager"],
                one.get("error_ratio"),
                _memory(one),
            ]
            texts = ["" if metric is None else f"{metric:.3f}" for metric in metrics]
            host = one.get("enqueue_us")
            rows.append((about, *texts, "" if host is None else f"{host:.0f}"))
    if len(rows) == 1:
        return []
    first = max(len(row[0]) for row in rows)
    return _few(
        [row[0].ljust(first) + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows], 11
    )


def _memory(one: Record) -> float | None:
    """Peak beyond the gradients returned ÷ the formula."""
    if "peak_mib" not in one or "formula_mib" not in one:
        return None
    return (one["peak_mib"] - one["returned_mib"]) / one["formula_mib"]


def _tests(records: Sequence[Record]) -> list[str]:
    tests = _kind(records, "test")
    failed = [one for one in tests if one["outcome"] == "failed"]
    passed = sum(one["outcome"] == "passed" for one in tests)
    if not tests:
        return []
    names = [
        f"{one['item'].removeprefix('tests/')}: {_last(one.get('message', ''))}" for one in failed
    ]
    return [f"tests: {passed} passed, {len(failed)} failed", *_few(names, 2)]


def _last(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _broken(records: Sequence[Record]) -> list[str]:
    return [
        f"{one['kind']}, {one['peer']}, {one['item']}: {one['outcome']}"
        for one in _kind(records, *KEPT)
        if one["outcome"] != KEPT[one["kind"]]
    ]


def _guarantees(records: Sequence[Record]) -> list[str]:
    calls = _kind(records, *KEPT)
    broken = _broken(records)
    kept = f"guarantees: {len(calls) - len(broken)} of {len(calls)} kept"
    return [kept, *_few(broken, 2)] if calls else []


def _slowest(records: Sequence[Record], name: str, passes: bool = False) -> list[str]:
    """The kernels of a step that take most of it; of its passes over rows alone."""
    of_baseline = [one for one in _kind(records, "kernel") if one["peer"] == name]
    shown = [one for one in of_baseline if not (passes and PRODUCT.search(one["item"]))]
    shown.sort(key=lambda one: -one["us"])
    return [f"{one['item'][:40]} {one['us']:.0f} µs" for one in shown[:3]]


def _kernels(records: Sequence[Record]) -> list[str]:
    names = dict.fromkeys(
        one["peer"] for one in _kind(records, "kernel") if one["peer"].startswith("ours-")
    )
    return [f"slowest of {name}: {', '.join(_slowest(records, name))}" for name in list(names)[:3]]


def _candidates(records: Sequence[Record]) -> Iterator[tuple[str, Record, Record]]:
    """(role, shipped tile, best tile) where both were timed."""
    timed = [one for one in _kind(records, "tile") if "median_ms" in one]
    for role in dict.fromkeys(one["role"] for one in timed):
        tiles = [one for one in timed if one["role"] == role]
        best = min(tiles, key=lambda one: one["median_ms"])
        for shipped in [one for one in tiles if one["in_use"] and one["kernel"] == best["kernel"]][
            :1
        ]:
            yield role, shipped, best


def _tiles(records: Sequence[Record]) -> list[str]:
    texts = []
    for role, shipped, best in _candidates(records):
        pair = [
            f"{tuple(one['tile'])} {one['over_blas']:.3f} × cuBLAS's time"
            for one in (shipped, best)
        ]
        texts.append(f"tile of {role}: shipped {pair[0]}, best {pair[1]}")
    return texts[:2]


def _workspace_runs(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """÷ floor by MiB, for each of ours."""
    runs: dict[str, dict[int, float]] = {}
    for one in _kind(records, "workspace"):
        if "over_floor" in one and "item" in one:
            runs.setdefault(one["peer"], {})[one["item"]] = one["over_floor"]
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
    """Simple rules from what was found to what it suggests, the gravest first."""
    if failed := [one for one in _kind(records, "test") if one["outcome"] == "failed"]:
        yield f"mend {failed[0]['item']} and {len(failed) - 1} more: no figure counts before"
    yield from (f"mend {text}" for text in _broken(records)[:1])
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
    for one in _kind(records, "part"):
        if one["outcome"] == "ended at its limit":
            limit = f"{one['seconds']:.0f} s"
            yield f"{one['item']} took more than its {limit}: the end of log.txt's part says where"


def _of_run(run: dict[str, Record], records: Sequence[Record]) -> Iterator[str]:
    """What the baselines of a shape, measured side by side, suggest."""
    timed = {name: one for name, one in run.items() if "median_ms" in one}
    ours = {name: one for name, one in timed.items() if name.startswith("ours-")}
    for name, one in run.items():
        if name.startswith("ours-") and one.get("failed"):
            yield f"mend {name} at {one['shape']}, {one['selection']}: {one['failed']}"
    for name, one in ours.items():
        where = f"{name} at {one['shape']}, {one['selection']}"
        over = ratios(run, name)["floor"]
        goal = {"ours-blas": BLAS, "ours-triton": MASK}.get(name)
        if one.get("enqueue_us", 0.0) > 900 * one["median_ms"]:
            host = f"{one['enqueue_us']:.0f} µs a step"
            yield f"{where}: the host needs {host}: fewer launches, or a CUDA graph"
        elif goal and over and over > goal:
            slowest = ", ".join(_slowest(records, name, passes=True)) or "not known"
            yield f"{where}: {over:.2f} × the floor > {goal:g}; the slowest passes: {slowest}"
        if (memory := _memory(one)) and memory > 1.0:
            much = f"{memory:.2f} × the formula's memory"
            yield f"{where}: {much}: what is allocated beside the workspace?"
    same = [ratios(run, name)["eager"] or math.inf for name in ours if name != "ours-fp8"]
    for name, one in timed.items():
        if name.startswith("compile") and (ratios(run, name)["eager"] or math.inf) < min(
            same, default=0.0
        ):
            where = f"{name} is faster than ours at {one['shape']}"
            yield f"{where}: compare their kernels (--stage profile)"
    fp8, blas = (ratios(run, name)["floor"] for name in ("ours-fp8", "ours-blas"))
    if fp8 and blas and fp8 > blas:
        yield (
            f"fp8 is no gain: {fp8:.2f} against {blas:.2f} × the floor; "
            "its quantisation, or _scaled_mm itself"
        )
