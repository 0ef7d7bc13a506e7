"""Records while they are measured: each is on the disk before the next one is measured, and an
early end leaves those so far. All commands that measure use this."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pre_kernels import screen
from pre_kernels.check.device import Cpu, Cuda

from . import record, where

Record = dict[str, Any]


class Kept:
    """The records of a run, in memory and in a file.

    If the disk refuses one, the run continues, since the table at the end shows what was measured.

    Attributes:
        records: those so far.
        problem: what the disk said first; empty if it has refused nothing.
        stopped: the exit status that ^C or SIGTERM asks for; 0 if neither came.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self.problem = ""
        self.stopped = 0

    def add(self, entry: Record) -> Record:
        """Keep a record, and return what was written."""
        # It is known even if ^C comes while it is written.
        self.records.append(entry)
        try:
            self.records[-1] = record.append(self.path, entry)
        except OSError as error:
            if not self.problem:
                self.problem = screen.why(error, self.path)
                print(f"\n{self.problem}. Measuring continues.", file=sys.stderr, flush=True)
        return self.records[-1]

    @contextmanager
    def measuring(self, parts: Iterable[float] = ()) -> Iterator[Progress]:
        """Within this, ^C and SIGTERM end the measurements and not the command."""
        progress = Progress(parts)
        print("measuring; ^C keeps what is measured until then", file=sys.stderr, flush=True)
        try:
            yield progress
        except KeyboardInterrupt as stop:
            self.stopped = screen.stopped(stop)
        finally:
            progress.clear()

    def every(self, entries: Iterable[Record]) -> None:
        """Keep records as they come, until the last one, ^C or SIGTERM, and say how far it is."""
        with self.measuring() as progress:
            for entry in entries:
                self.add(entry)
                names = ("kind", "shape", "dtype", "selection", "peer", "item")
                what = " ".join(str(entry[name]) for name in names if entry.get(name) is not None)
                progress.tell(f"{len(self.records)} records, the last: {what}")

    def told(self) -> list[str]:
        """Return the last lines of a run: whether it is whole, and where its records are."""
        lines = []
        if self.stopped:
            by = "SIGTERM" if self.stopped == screen.TERMINATED else "^C"
            lines.append(f"Stopped by {by}: this is what was measured until then.")
        if self.problem:
            lines.append(f"Some records are only on this screen: {self.problem}.")
        elif self.records:
            lines.append(where.told(self.path))
        return lines

    @property
    def status(self) -> int:
        """The exit status of the run, whatever its records say."""
        return self.stopped or int(bool(self.problem))


def start(arguments: Any, device: Cpu | Cuda, refuse: Callable[[str], NoReturn]) -> Kept:
    """Return an empty `Kept` for the device (see `where.file`)."""
    return Kept(where.file(arguments, record.file(Path(), device).name, refuse))


class Progress:
    """Says on stderr what is being measured: in place on a terminal, else a line now and then.
    Nothing is written between two calls, since a bar that moves takes time from what is measured.

    Args:
        parts: predicted seconds of each part of the run, if they are known.
    """

    # seconds between lines where there is no terminal
    EVERY = 10.0
    # This many seconds as predicted count as measured, so that the first ones do not decide alone.
    TRUST = 30.0

    def __init__(self, parts: Iterable[float] = ()) -> None:
        self.parts = list(parts)
        self.began = time.monotonic()
        self.last = -self.EVERY
        self.number = 0
        self.done = 0.0
        self.running = 0.0
        self.left_here = 0.0
        self.width = 0

    def part(self, number: int) -> None:
        """Begin a part, from 0. What the one before has left out does not count as done."""
        self.number = number
        self.done += self.running
        self.running = 0.0
        self.left_here = self.parts[number]
        # A new part always gets a line.
        self.last = -self.EVERY

    def tell(self, text: str, seconds: float = 0.0) -> None:
        """Begin something that is predicted to take so many seconds."""
        self.done += self.running
        self.left_here -= self.running
        self.running = seconds
        if self.parts:
            text = f"{self.number + 1}/{len(self.parts)} {text}, {minutes(self.left())} left"
        self._write(text)

    def left(self) -> float:
        """Return the seconds that are left, by the predictions and how far off they were so far."""
        predicted = max(self.left_here, 0.0) + sum(self.parts[self.number + 1 :])
        took = time.monotonic() - self.began
        return predicted * (took + self.TRUST) / (self.done + self.TRUST)

    def clear(self) -> None:
        """Remove the line from a terminal, for what is printed next."""
        if self.width:
            print("\r" + " " * self.width, end="\r", file=sys.stderr, flush=True)
            self.width = 0

    def _write(self, text: str) -> None:
        now = time.monotonic()
        if sys.stderr.isatty():
            text = text[: shutil.get_terminal_size().columns - 1]
            print("\r" + text.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(text)
        elif now - self.last >= self.EVERY:
            print(text, file=sys.stderr, flush=True)
            self.last = now


def minutes(seconds: float) -> str:
    """Return a rounded time in words."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    return f"about {seconds / 60:.0f} min"
