"""The comparison seed by seed: a seed that is finished is saved, so that a run which was stopped
resumes from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import pre_kernels
from pre_kernels import sources
from pre_kernels.screen import plural, why, write

from .compare import run_seed
from .export import Kept
from .settings import Settings
from .stages import Bar
from .workers import each_seed

Results = dict[str, Any]


class Parts:
    """The finished seeds of a run in the folder `out`, a file for each.

    A part of another experiment (other settings, code or versions) is not read.

    Attributes:
        done: the seeds that are finished, by number. "seconds" of a part is the time from the start
            of the run, without times in which the run was stopped.
        others: the names of the files of these seeds that are not read.
        problems: why files could not be written.
    """

    def __init__(self, settings: Settings, device: str, out: Path) -> None:
        self.folder = out / "parts"
        self.models = out / "models"
        # The number of seeds changes nothing within a seed.
        self.experiment = {
            "settings": dataclasses.asdict(dataclasses.replace(settings, seeds=0)),
            "device": device,
            "measured": sources.digest("demo"),
            "versions": versions(),
        }
        self.problems: list[str] = []
        found = ((seed, self._read(seed)) for seed in range(settings.seeds))
        self.done = {seed: part for seed, part in found if part is not None}
        self.others = [
            self._path(seed).name
            for seed in range(settings.seeds)
            if seed not in self.done and self._path(seed).exists()
        ]
        self.before = max((part["seconds"] for part in self.done.values()), default=0.0)
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(self.before + time.monotonic() - self.start, 1)

    def add(self, seed: int, result: tuple[Results, list[str]]) -> None:
        """Save a finished seed. A disk that does not take it is a problem, and no error."""
        metrics, problems = result
        self.problems += problems
        self.done[seed] = {**self.experiment, "seconds": self.seconds, "metrics": metrics}
        path = self._path(seed)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, json.dumps(self.done[seed]))
        except OSError as error:
            self.problems.append(why(error, path))

    def kept(self) -> list[int]:
        """Return the seeds that are on the disk."""
        return [seed for seed in sorted(self.done) if self._path(seed).exists()]

    def remove(self) -> None:
        """Remove the files, whose content is in the results."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)

    def _path(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}.json"

    def _read(self, seed: int) -> Results | None:
        try:
            part: Results = json.loads(self._path(seed).read_text(encoding="utf-8"))
            same = {name: part[name] for name in self.experiment} == self.experiment
            # Seed 0's models belong to its measurements.
            complete = seed != 0 or (self.models / "with" / "config.json").exists()
            return part if same and complete and part["metrics"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def compare(
    settings: Settings, device: str, bar: Bar, jobs: int, parts: Parts, keep: Path | None = None
) -> Results:
    """Return all measurements, ready for JSON: `seeds` holds, per seed, the metrics "before",
    "without" and "with". `measured` is a digest of the code that the results depend on.

    Seeds that `parts` has are not run again. Seed 0's models, and scenes that no training saw, are
    written into `keep`.
    """
    left = [seed for seed in range(settings.seeds) if seed not in parts.done]
    each_seed(_run, left, (settings, device, keep), bar, jobs, parts.add)
    return {
        "settings": dataclasses.asdict(settings) | {"layer": settings.pre_layer},
        "device": machine(device, jobs),
        "versions": versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "measured": sources.digest("demo"),
        "seconds": parts.seconds,
        "seeds": [parts.done[seed]["metrics"] for seed in range(settings.seeds)],
    }


def _run(
    seed: int, settings: Settings, device: str, keep: Path | None, bar: Bar
) -> tuple[Results, list[str]]:
    """Run a seed, and return its metrics and why files could not be written."""
    kept = Kept(keep) if keep is not None and seed == 0 else None
    metrics = run_seed(seed, settings, device, kept.model if kept else None, bar)
    return metrics, kept.problems if kept else []


def versions() -> dict[str, str]:
    return {
        "pre_kernels": pre_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine(device: str, jobs: int) -> str:
    """Return the names of the processors that computed, and how many."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # Only Linux has this file.
        said = ""
    name = re.search(r"^model name\s*:\s*(.+)$", said, re.MULTILINE)
    cpu = name[1].strip() if name else platform.processor() or platform.machine() or "CPU"
    cores = os.cpu_count() or 1
    return f"{cpu}, {plural(cores, 'core')}, {plural(jobs, 'process', 'processes')}"


def commit() -> str | None:
    """Return the commit of the checkout that runs this, or None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
