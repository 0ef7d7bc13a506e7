"""The command line: `pre-kernels check | demo | diagnose | trace | tune | env`.

What `--help`, `--version` and a wrong option need imports no torch, which takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pre_kernels import screen

with screen.starting():
    from .arguments import parser

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 if something failed, 2 for wrong arguments,
    130 after ^C, 141 if nobody reads the output, 143 after SIGTERM."""
    return screen.run(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    top = parser()
    options = top.parse_args(arguments)
    if options.command is None:
        top.print_help()
        return 2
    options.arguments = arguments

    if options.command == "demo":
        print("Starting: PyTorch and transformers take some seconds to load.", flush=True)

    with screen.starting():
        try:
            from . import commands
        except ImportError as error:
            # A torch that is too old or cannot start, or a second copy of the library.
            screen.say(f"error: {error}")
            return 1

    return commands.run(options)
