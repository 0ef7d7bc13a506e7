"""`pre-kernels demo`: run the comparison, show and save what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from .compare import compare
from .progress import bars
from .report import HEADER, caption, cells, conclusion, save
from .settings import Settings


def run(settings: Settings, device: str, out: Path, console: Console | None = None) -> dict[str, Any]:
    """Train, measure, print the table, write the files into `out`; returns what was measured."""
    console = Console() if console is None else console
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # more gain nothing at this width, and take several times as long on a busy machine
    try:
        with threadpool_limits(1), bars(console) as bar:  # the same for scikit-learn's probes
            found = compare(settings, device, bar)
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)

    table = Table(*HEADER, title="A tiny LLaVA on scenes of handwritten digits")
    for row in cells(found):
        table.add_row(*row)
    console.print(table)
    console.print(caption(found), style="dim")
    console.print()
    for sentence in conclusion(found):
        console.print(f"• {sentence}")
    console.print()
    for path, what in zip(save(found, out), ("all numbers", "the table", "the curves"), strict=True):
        console.print(f"{what}: {path}", soft_wrap=True)
    return found
