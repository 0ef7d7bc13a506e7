"""Result files: one JSON object a line, only ever appended to, each line saying where and of what
it was measured."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pre_kernels import sources
from pre_kernels.check.device import Cpu, Cuda

from . import ROOT

# What is measured. `pre_kernels/integrations` is a link to the second folder: the first is hashed
# without it, and git, which does not look behind a link, is asked about both.
SOURCES = ("pre_kernels", "integrations")
RESULTS = Path(__file__).with_name("results")

# a later line of the same key replaces an earlier one in tables and plots
KEY = (
    "kind",
    "device",
    "torch",
    "triton",
    "threads",
    "shape",
    "dtype",
    "selection",
    "peer",
    "item",
)


def folder(given: str | None = None) -> Path:
    """Where results go: as given, else GPU_OUT, else bench/results."""
    path = Path(given or os.environ.get("GPU_OUT") or RESULTS)
    path.mkdir(parents=True, exist_ok=True)
    return path


def file(where: Path, device: Cpu | Cuda) -> Path:
    """The file for this device: cpu.jsonl, or a GPU's name."""
    if dry_run():
        return where / "dry-run.jsonl"
    name = device.kind if device.kind == "cpu" else device.describe()["device"]
    return where / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".jsonl")


def stamp(device: Cpu | Cuda) -> dict[str, Any]:
    """Device, versions, date, commit and a hash of the sources (a copy without .git has that at
    least); of which run of `bench.gpu` it is a part."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        **device.describe(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "date": now.isoformat(timespec="seconds"),
        "commit": os.environ.get("GIT_COMMIT") or _commit(),
        "source": _source(),
        **({"run": os.environ["BENCH_RUN"]} if "BENCH_RUN" in os.environ else {}),
        **({"dry_run": True} if dry_run() else {}),
    }


def dry_run() -> bool:
    """Whether measurements are of tiny sizes, to try the scripts: kept apart, and in no table."""
    return os.environ.get("BENCH_DRY_RUN") == "1"


def append(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Add a line, with a digest of the code that results of its kind depend on, and return what was
    written. It is on the disk then, since the process may be killed at any time."""
    if "kind" in record:
        record = {**record, "measured": sources.digest(record["kind"])}
    with path.open("a") as out:
        out.write(json.dumps(record) + "\n")
        out.flush()
        os.fsync(out.fileno())
    return record


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Every record of some files; a line cut short by a kill is passed over."""
    records = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def latest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last record of each key, in the order in which the keys first came.

    Baselines that were measured side by side stay together: of the runs of a shape the last one
    counts, or the last with eager and the floor in it if there is one, since without them a time
    has nothing to be divided by.
    """
    records = list(records)
    timed: dict[str, set[str]] = {}
    for record in records:
        names = timed.setdefault(record.get("group", ""), set())
        if "median_ms" in record:
            names.add(record.get("peer", ""))
    chosen: dict[tuple[Any, ...], str] = {}
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        place = _place(record)
        group = record.get("group", "")
        if (
            place not in chosen
            or timed[group] >= {"eager", "floor"}
            or not timed[chosen[place]] >= {"eager", "floor"}
        ):
            chosen[place] = group
    for record in records:
        place = _place(record)
        if record.get("group", "") == chosen[place]:
            last[(*place, record.get("peer"))] = record
    return list(last.values())


def _place(record: dict[str, Any]) -> tuple[Any, ...]:
    """The key but for the baseline; records from before rows were also given as indices are of a
    mask."""
    return tuple(
        record.get(name, "mask" if name == "selection" else None) for name in KEY if name != "peer"
    )


def changed(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records whose code is no longer the code that is here."""
    return [entry for entry in records if entry.get("measured") != sources.digest(entry["kind"])]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def _commit() -> str:
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    return commit + (
        "-dirty" if _git("status", "--porcelain", *SOURCES, "bench", ":!bench/results") else ""
    )


@cache
def _source() -> str:
    digest = hashlib.sha256()
    for path in files():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def files() -> list[Path]:
    """The Python files of what is measured, each once: none behind a link, which `rglob` follows or
    not by the version of Python."""
    paths: list[Path] = []
    for folder in SOURCES:
        walk = os.walk(ROOT / folder, followlinks=False)
        every = (Path(place, name) for place, _, names in walk for name in names)
        paths += sorted(path for path in every if path.suffix == ".py")
    return paths
