"""Measurements: speed, memory and correctness of the loss beside its baselines, in the same run.
This package is not part of the wheel."""

import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]


def _stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show an error that nothing caught; of ^C only that it came."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped before anything was measured", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# A command, `python -m bench.…`, imports torch for seconds before it can catch ^C.
if sys.argv[0] == "-m":
    sys.excepthook = _stopped
