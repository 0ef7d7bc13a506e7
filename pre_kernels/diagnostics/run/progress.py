"""How far a run of `pre-kernels diagnose` is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

# Seconds between two lines where there is no terminal.
BETWEEN = 30.0
VERBS = {"images": "measuring", "layers": "computing the metrics of"}


class Meter:
    """Counts the units of work of a run, and estimates the time that is left for all of it.

    A unit is an image that is measured, or a layer whose metrics are computed from the sums. The
    estimate takes the mean time that the units of each kind have taken so far. It comes with the
    first unit.

    Args:
        console: where progress is shown.
        images: for each model, the number of images still to measure.
    """

    def __init__(self, console: Console, images: Mapping[str, int]) -> None:
        self.console = console
        self._left = {(model, "images"): number for model, number in images.items()}
        # The number of layers, once a model is loaded.
        self._layers = 0
        self._seconds = {"images": 0.0, "layers": 0.0}
        self._units = {"images": 0, "layers": 0}

    @contextlib.contextmanager
    def stage(
        self, model: str, kind: str, total: int, done: int = 0
    ) -> Iterator[Callable[[], None]]:
        """Show the progress over `total` units of `kind`, of which `done` are there. Yields a
        function to call after each unit."""
        self._left[model, kind] = total - done
        if kind == "layers":
            self._layers = total
        # The end of a long name tells models apart, and the numbers need their room.
        most = self.console.width // 4
        short = model if len(model) <= most else "…" + model[1 - most :]
        animated = self.console.is_terminal and not self.console.is_dumb_terminal
        bar = Progress(
            TextColumn(
                "{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=self.console,
            disable=not animated,
            expand=True,
        )

        def described() -> str:
            return f"{short}: {done} of {total} {kind}"

        task = bar.add_task(described(), total=total, completed=done, left="")
        before = time.monotonic()
        said = before

        def step() -> None:
            nonlocal before, done, said
            now = time.monotonic()
            done += 1
            self._left[model, kind] -= 1
            self._seconds[kind] += now - before
            self._units[kind] += 1
            before = now
            left = self.estimate()
            # A finished bar stays on the screen, and its estimate would be out of date.
            shown = left if done < total else ""
            bar.update(task, completed=done, description=described(), left=shown)
            if not animated and now - said >= BETWEEN:
                said = now
                self.console.print(f"{described()}, {left}")

        if not animated:
            self.console.print(f"{model}: {VERBS[kind]} {total - done} {kind}")
        # An old rich prints an empty line at the end of a bar that is not shown.
        with bar if animated else contextlib.nullcontext():
            yield step

    def estimate(self) -> str:
        """The time that is left in words, or an empty string if nothing is known yet."""
        left = dict(self._left)
        for model, _ in self._left:
            left.setdefault((model, "layers"), self._layers)
        seconds = 0.0
        for (_, kind), units in left.items():
            if self._units[kind]:
                seconds += units * self._seconds[kind] / self._units[kind]
        return f"about {in_words(seconds)} left" if seconds >= 0.5 else ""


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' bar of the weights out of a log: it is for a terminal."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def in_words(seconds: float) -> str:
    """A duration in its largest unit: 40 s, 3 min, 2.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
