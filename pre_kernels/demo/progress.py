"""Progress on a terminal as bars, with an estimate of the whole; elsewhere (a log file, CI) as a
line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from .stages import Advance, Bar, Stage

# Without a terminal a line comes at the end of a stage, and after so many seconds without one.
QUIET = 30.0


class Estimate:
    """How much of the work is done, and how long the rest takes.

    Args:
        total: the expected seconds of all stages together, as `stages` has them.
        jobs: how many stages run at once.
        clock: the time in seconds.
    """

    def __init__(
        self, total: float, jobs: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self.jobs = jobs
        self.done = 0.0
        self.clock = clock
        self.start: float | None = None

    def advance(self, stage: Stage) -> None:
        """Count a step."""
        self.done = min(self.done + stage.seconds, self.total)
        # Processes take seconds to start, which would count as slow steps.
        if self.start is None:
            self.start = self.clock()

    def __str__(self) -> str:
        if self.start is None:
            left = self.total / self.jobs
        else:
            # The expectation counts as much as a twentieth of the work, so the first steps do not
            # change everything.
            trust = self.total / 20
            measured = self.clock() - self.start + trust / self.jobs
            left = (self.total - self.done) * measured / (self.done + trust)
        if left < 60:
            return "less than a minute left"
        return f"about {left / 60:.0f} min left"


@contextmanager
def bars(console: Console, total: float = 0.0, jobs: int = 1) -> Iterator[Bar]:
    """Provide a display in which each running stage has a bar, and the whole has one below.

    Args:
        total: the expected seconds of all stages. 0: the whole has no bar.
        jobs: how many stages run at once.
    """
    estimate = Estimate(total, jobs)
    # 60 columns have room for the longest name, a bar, the percentage and a loss.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    terminal = console.is_terminal
    last = time.monotonic()

    def line(text: str) -> None:
        nonlocal last
        last = time.monotonic()
        if total:
            text = f"{estimate.done / total:4.0%}  {text} ({estimate})"
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    with Progress(*columns, console=console, transient=True, disable=not terminal) as progress:
        whole = progress.add_task(str(estimate), total=total or None, note="", visible=total > 0)

        @contextmanager
        def bar(stage: Stage, name: str, steps: int) -> Iterator[Advance]:
            task = progress.add_task(name, total=steps, note="")
            start = time.monotonic()
            shown = ""
            taken = 0

            def advance(loss: float) -> None:
                nonlocal shown, taken
                taken += 1
                shown = "" if loss != loss else f"loss {loss:.3f}"
                estimate.advance(stage)
                progress.update(task, advance=1, note=shown)
                if total:
                    progress.update(whole, completed=estimate.done, description=str(estimate))
                if not terminal and time.monotonic() - last > QUIET:
                    line(f"{name}: step {taken} of {steps}")

            try:
                yield advance
            finally:
                progress.remove_task(task)
            if not terminal:
                after = f", {shown}" if shown else ""
                line(f"{name}: {steps} steps{after}, {time.monotonic() - start:.0f} s")

        yield bar
