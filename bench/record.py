"""Result files: one JSON object on each line. Lines are only appended, and each says where it was
measured and with which code."""

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

from . import ROOT, where

# The code that is measured. `pre_kernels/integrations` is a link to the second folder, so the first
# is hashed without it. git does not look behind a link and is asked about both.
SOURCES = ("pre_kernels", "integrations")
RESULTS = where.RESULTS

# In tables and plots a later line with the same key replaces an earlier one.
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


def file(folder: Path, device: Cpu | Cuda) -> Path:
    """Return the file for this device: cpu.jsonl, or one with the name of a GPU."""
    if dry_run():
        return folder / "dry-run.jsonl"
    name = device.kind if device.kind == "cpu" else device.describe()["device"]
    return folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".jsonl")


def stamp(device: Cpu | Cuda) -> dict[str, Any]:
    """Return device, versions, date, commit and a hash of the sources (which a copy without .git
    has too), and the run of `bench.gpu` that this is a part of."""
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
    """Return whether the sizes are tiny, to try the scripts. Such records are kept separately, and
    are in no table."""
    return os.environ.get("BENCH_DRY_RUN") == "1"


def append(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Add a line, with a digest of the code that results of its kind depend on, and return what was
    written. It is on the disk then, since the process may be killed at any time."""
    if "kind" in record:
        record = {**record, "measured": sources.digest(record["kind"])}
    with path.open("ab+") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            # A line that a kill or a full disk has cut short does not take this one with it.
            out.write(b"\n" * (out.read() != b"\n"))
        out.write(json.dumps(record).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())
    return record


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return every record of some files, without lines that were cut short by a kill."""
    records = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def latest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last record of each key, in the order in which the keys first came.

    Baselines that were measured side by side stay together. Of the runs of a shape the last one
    counts, or the last that has eager and the floor, since without them there is nothing to divide
    a time by.
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
        key = _key(record)
        group = record.get("group", "")
        if (
            key not in chosen
            or timed[group] >= {"eager", "floor"}
            or not timed[chosen[key]] >= {"eager", "floor"}
        ):
            chosen[key] = group
    for record in records:
        key = _key(record)
        if record.get("group", "") == chosen[key]:
            last[(*key, record.get("peer"))] = record
    return list(last.values())


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key without the baseline. Records without "selection" are of a mask."""
    return tuple(
        record.get(name, "mask" if name == "selection" else None) for name in KEY if name != "peer"
    )


def changed(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the records whose code differs from the code that is here."""
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
    """Return the Python files of the code that is measured, each once. Files behind a link are left
    out, since `rglob` follows links in some versions of Python only."""
    paths: list[Path] = []
    for folder in SOURCES:
        walk = os.walk(ROOT / folder, followlinks=False)
        every = (Path(parent, name) for parent, _, names in walk for name in names)
        paths += sorted(path for path in every if path.suffix == ".py")
    return paths
