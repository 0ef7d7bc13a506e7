"""Where results go: into a folder that git ignores, unless the committed results are asked for.

Every command that measures has these two options. This module imports neither torch nor
pre_kernels, so that a command can read its options at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from . import ROOT

# the committed results
RESULTS = Path(__file__).with_name("results")
UNTRACKED = ROOT / "bench-out"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command, whose help shows the docstring of its module as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_options(add: Callable[..., Any]) -> None:
    """Add --results and --record. `add` is the `add_argument` of argparse or the `addoption` of
    pytest."""
    add(
        "--results",
        "--out",
        metavar="DIR",
        help="folder of the results (default: GPU_OUT, else bench-out, which git ignores)",
    )
    add(
        "--record",
        action="store_true",
        help="append to the committed results in bench/results (for maintainers)",
    )


def folder(results: str | None = None, committed: bool = False) -> Path:
    """Return the folder of the results, which is made if it is not there.

    Args:
        results: the argument of --results.
        committed: whether --record was given.

    Raises:
        ValueError: if both were given.
        OSError: if the folder cannot be made.
    """
    if results and committed:
        raise ValueError(f"--record: got --results {results} too, want one of them; leave one out")
    named = results or (not committed and os.environ.get("GPU_OUT"))
    path = Path(named) if named else RESULTS if committed else UNTRACKED
    path.mkdir(parents=True, exist_ok=True)
    return path


def file(arguments: Any, name: str, refuse: Callable[[str], NoReturn]) -> Path:
    """Return the file of that name in the folder that --results and --record of `arguments` ask
    for, after a try to open it: what cannot be kept is not measured. `refuse` ends the command
    with a message, as `ArgumentParser.error` does."""
    try:
        path = folder(arguments.results, arguments.record) / name
        path.open("a").close()
    except OSError as error:
        refuse(
            f"--results: got {error.filename}, want a folder that can be written "
            f"({error.strerror}); name another one"
        )
    except ValueError as error:
        refuse(str(error))
    return path


def told(path: Path) -> str:
    """Return a sentence that says where the records are."""
    # The file may be a link.
    where = path.parent.resolve() / path.name
    if where.parent == UNTRACKED.resolve():
        tail = ", which git ignores; --record appends to the committed results"
    elif where.parent == RESULTS.resolve():
        tail = ", the committed results; `make bench-report` writes them into the pages"
    else:
        tail = ""
    try:
        shown = where.relative_to(Path.cwd())
    except ValueError:
        shown = where
    return f"Records are in {shown}{tail}."
