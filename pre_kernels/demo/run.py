"""`pre-kernels demo`: run the comparison, and show and save its results."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .compare import compare
from .progress import bars
from .results import HEADER, caption, cells, conclusion, save
from .settings import Settings
from .workers import quiet


def run(
    settings: Settings, device: str, out: Path, console: Console | None = None, jobs: int = 1
) -> dict[str, Any]:
    """Train, measure, print the table, write the files into `out`, and return the measurements.

    On a CPU `jobs` seeds run at once, each in its own process with one thread.
    """
    console = Console() if console is None else console
    restore = quiet()
    try:
        with bars(console) as bar:
            results = compare(settings, device, bar, jobs, out)
    finally:
        restore()

    table = Table(*HEADER, title="A tiny LLaVA on scenes of handwritten digits")
    for row in cells(results):
        table.add_row(*row)
    console.print(table)
    console.print(caption(results), style="dim")
    console.print()
    for sentence in conclusion(results):
        console.print(f"• {sentence}")
    console.print()
    for path, what in zip(
        save(results, out), ("all numbers", "the table", "the curves", "the report"), strict=True
    ):
        console.print(f"{what}: {path}", soft_wrap=True)
    models = out / "models"
    scenes = out / "scenes"
    console.print("To look at seed 0's models layer by layer, run:")
    more = [
        models / "without",
        scenes / "images",
        "--masks",
        scenes / "masks",
        "--compare",
        models / "with",
    ]
    command = shlex.join(map(str, ["pre-kernels", "diagnose", *more, "--out", out / "diagnosis"]))
    console.print(f"  {command}", soft_wrap=True, markup=False)
    return results
