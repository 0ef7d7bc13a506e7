"""`pre-kernels demo`: run the comparison, and show and save its results."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pre_kernels.screen import plural

from . import Unsaved, stages, words
from .parts import Parts, compare
from .progress import Estimate, bars
from .results import SHORT_HEADER, SMOKE_TITLE, save, short_rows
from .settings import Settings
from .threads import quiet

NAME = "pre-kernels"
# A narrower screen has no room for standard deviations.
WIDE = 74


def run(
    settings: Settings, device: str, out: Path, console: Console | None = None, jobs: int = 1
) -> dict[str, Any]:
    """Train, measure, write the files into `out`, print what they show, and return the
    measurements.

    On a CPU `jobs` seeds run at once, each in its own process with one thread. Seeds that an
    earlier run of the same demo has finished are not run again.

    Raises:
        KeyboardInterrupt: its text says what is kept.
        Unsaved: files could not be written. What was measured has been printed.
    """
    console = Console() if console is None else console
    smoke = words.smoke_test(vars(settings))
    if smoke:
        console.print(words.SMOKE, style="bold")

    parts = Parts(settings, device, out)
    with _kept(parts):
        results = _measure(settings, device, out, console, jobs, parts)
        paths, problems = save(results, out)
    problems = [*parts.problems, *problems]
    if not problems:
        parts.remove()
    show(results, paths, out, console)
    if problems:
        more = f" ({len(problems) - 1} more could not be written)" if len(problems) > 1 else ""
        problem = f"{problems[0]}{more}"
        raise Unsaved(problem)
    return results


def _measure(
    settings: Settings, device: str, out: Path, console: Console, jobs: int, parts: Parts
) -> dict[str, Any]:
    """Run the seeds that `parts` lacks, with bars, and return all measurements."""
    if parts.others:
        console.print(
            f"{parts.folder} also has {', '.join(parts.others)}, measured with other settings, "
            "code or versions, or not complete: not used here",
            highlight=False,
        )
    if parts.done:
        again = ", ".join(map(str, parts.done))
        console.print(f"Resuming: seed {again} is finished in {parts.folder}.", highlight=False)
    left = settings.seeds - len(parts.done)
    jobs = min(jobs, max(left, 1))
    total = left * stages.seconds(settings)
    console.print(
        f"{plural(left, 'seed')}, {jobs} at a time: {Estimate(total, jobs)}", highlight=False
    )
    restore = quiet()
    try:
        with bars(console, total, jobs) as bar:
            return compare(settings, device, bar, jobs, parts, out)
    finally:
        restore()


@contextlib.contextmanager
def _kept(parts: Parts) -> Iterator[None]:
    """Let an interruption say what is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        kept = parts.kept()
        seeds = f"seed{'s' if len(kept) > 1 else ''} {', '.join(map(str, kept))}"
        said = f"{seeds} kept in {parts.folder}; " if kept else "no seed was finished; "
        again = "resumes from there" if kept else "starts again"
        raise type(stop)(f"{said}the same command {again}") from None


def show(results: dict[str, Any], paths: list[Path], out: Path, console: Console) -> None:
    """Print the verdict, what PRe is, the short table, where the files are, and what to run
    next."""
    smoke = words.smoke_test(results["settings"])
    console.print(words.SMOKE if smoke else " ".join(words.verdict(results)), highlight=False)
    console.print()
    console.print(words.ABOUT, style="dim", highlight=False)
    console.print()
    table = Table(
        box=None, title=SMOKE_TITLE if smoke else None, padding=(0, 2, 0, 0), pad_edge=False
    )
    wide = console.width >= WIDE
    rows = short_rows(results, spreads=wide)
    for number, head in enumerate(SHORT_HEADER[: len(rows[0])]):
        table.add_column(
            head if wide else head.replace(" PRe", "\nPRe"),
            justify="right" if number else "left",
            min_width=max(len(row[number]) for row in rows),
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    # The first name in full, of the others the endings: with the default folder one line.
    names = [path.suffix if n else path.name for n, path in enumerate(reversed(paths))]
    written = f"Files in {out}: {', '.join(names)}. Layer by layer:"
    console.print(written, soft_wrap=True, highlight=False, markup=False)
    console.print(f"  {next_command(out)}", soft_wrap=True, markup=False, highlight=False)


def next_command(out: Path) -> str:
    """Return the command that diagnoses the demo's models, as it can be typed here."""
    models = out / "models"
    scenes = out / "scenes"
    more = [
        models / "without",
        scenes / "images",
        "--masks",
        scenes / "masks",
        "--compare",
        models / "with",
        "--out",
        out / "diagnosis",
    ]
    return shlex.join(map(str, [started(), "diagnose", *more]))


def started() -> str:
    """Return the program as it can be typed here: its name if the shell finds it by that, else its
    path."""
    program = Path(sys.argv[0])
    if program.name != NAME:
        # python -m, or a call of the function: the program beside this Python
        program = Path(sys.executable).with_name(NAME)
    found = shutil.which(NAME)
    if not program.exists() or (found and Path(found).resolve() == program.resolve()):
        return NAME
    with contextlib.suppress(ValueError):
        program = program.relative_to(Path.cwd())
    # A shell looks for a name without a slash elsewhere.
    return str(program) if len(program.parts) > 1 else f"./{program}"
