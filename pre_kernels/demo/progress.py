"""Progress bars on a terminal, or one line per stage where there is no terminal (a log file,
CI)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .model import Advance
from .workers import Bar


@contextmanager
def bars(console: Console) -> Iterator[Bar]:
    """Provide a display in which every stage of the demo gets a bar."""
    columns = (
        TextColumn("{task.description:<41}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]:>6}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        @contextmanager
        def bar(name: str, steps: int) -> Iterator[Advance]:
            task = progress.add_task(name, total=steps, loss="")
            start = time.monotonic()
            shown = ""

            def advance(loss: float) -> None:
                nonlocal shown
                shown = "" if loss != loss else f"{loss:.3f}"
                progress.update(task, advance=1, loss=shown)

            yield advance
            if not console.is_terminal:
                seconds = time.monotonic() - start
                console.print(
                    f"{name}: {steps} steps, loss {shown or '–'}, {seconds:.0f} s", highlight=False
                )

        yield bar
