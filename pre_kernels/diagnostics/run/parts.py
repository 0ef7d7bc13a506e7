"""The files that a run of `pre-kernels diagnose` writes, and what it keeps to resume."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pre_kernels
from pre_kernels.screen import PARTIAL, why, write

from .data import Images
from .settings import Settings

FILES = {
    "diagnosis.json": "all numbers",
    "layers.csv": "a line for each layer",
    "report.html": "the report",
}
# The folder for the result of each model and the state of an interrupted run.
PARTS = "parts"
# The share of the time that may be spent on saving the state of a run.
SAVING = 0.05


@dataclass(frozen=True)
class Part:
    """The files of one model: its result at `path` and, while it is being measured, its state at
    `state`."""

    path: Path

    @classmethod
    def of(cls, settings: Settings, source: str, images: Images, folder: Path) -> Part:
        """The part whose name depends on everything that the result depends on."""
        settled = {
            name: str(value)
            for name, value in dataclasses.asdict(settings).items()
            if name != "models"
        }
        files = sorted(Path(source).rglob("*")) if Path(source).is_dir() else []
        files += [item.path for item in images.items]
        files += [path for path in (settings.masks, settings.labels) if path is not None]
        if settings.masks is not None and settings.masks.is_dir():
            files += sorted(settings.masks.rglob("*"))
        parts = folder.resolve()
        stamps = [
            (str(file), stat.st_size, stat.st_mtime_ns)
            for file in files
            if (stat := file.stat()) and file.is_file() and not written(file.resolve(), parts)
        ]
        key = json.dumps([settled, source, stamps, pre_kernels.__version__, torch.__version__])
        return cls(
            folder / f"{Path(source).name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        )

    @property
    def state(self) -> Path:
        return self.path.with_suffix(".safetensors")

    def result(self) -> dict[str, Any] | None:
        """The result, or None if there is none yet. ValueError if the file is broken."""
        if not self.path.exists():
            return None
        try:
            result: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"out: {self.path} is broken: {error}; delete it to measure again"
            ) from error
        return result

    def keep(self, result: dict[str, Any]) -> None:
        write(self.path, json.dumps(result) + "\n")
        self.state.unlink(missing_ok=True)


class Saver:
    """Saves the state of a run, now and then so rarely that it takes at most the share `SAVING` of
    the time.

    A disk that is full or read-only does not end the run. It is said once.

    Args:
        save: writes the state.
        say: takes the line about the disk.
    """

    def __init__(self, save: Callable[[], None], say: Callable[[str], None]) -> None:
        self._save = save
        self._say = say
        self._said = False
        self._start = time.monotonic()
        self._due = self._start + 30.0

    def elapsed(self) -> float:
        """Seconds since this was created."""
        return time.monotonic() - self._start

    def now_and_then(self) -> None:
        """Save if it is time."""
        begin = time.monotonic()
        if begin < self._due:
            return
        self.save()
        end = time.monotonic()
        self._due = end + max(30.0, (end - begin) / SAVING)

    def save(self) -> None:
        """Save, or say that the disk takes nothing."""
        try:
            self._save()
        except OSError as error:
            if not self._said:
                self._said = True
                self._say(f"{why(error)}; measuring continues, but it could not be resumed")


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Let only one run at a time write into `out`, whose folder of parts is there.

    The lock is on that folder, and ends with the process. Where the system cannot lock a folder, as
    on Windows and some network drives, nothing is checked.

    Raises:
        ValueError: another process has it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder = os.open(out / PARTS, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"out: got {out}, into which another run is writing, want a folder of its own "
                    "for each run: wait for the other one to end, or add --out with another folder"
                ) from error
        yield
    finally:
        os.close(folder)


def strangers(folder: Path, parts: Collection[Part]) -> str | None:
    """A line about what `folder` holds of runs with other settings, or None."""
    known = {path.name for part in parts for path in (part.path, part.state)}
    names = sorted(
        path.name + " (unfinished)" * (path.suffix == ".safetensors")
        for path in folder.iterdir()
        if path.suffix in (".json", ".safetensors") and path.name not in known
    )
    if not names:
        return None
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{folder} also has {', '.join(names[:3])}{more}, measured with other settings, images, "
        "models or versions: not used here"
    )


def written(file: Path, parts: Path) -> bool:
    """Whether a run with this folder of parts wrote the file. Both paths are resolved. It matters
    because --out may lie in the folder of the model."""
    return parts in file.parents or (
        file.parent == parts.parent and file.name.removesuffix(PARTIAL) in FILES
    )
