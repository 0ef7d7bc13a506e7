"""Trainings of seeds with bars, which ^C and SIGTERM stop."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from pre_kernels import screen
from pre_kernels.demo.progress import bars
from pre_kernels.demo.stages import Bar
from pre_kernels.demo.threads import quiet


def until_stopped(run: Callable[[Bar], object]) -> int:
    """Run with bars, and return 0, or the exit status that ^C or SIGTERM asks for."""
    restore = quiet()
    try:
        with bars(Console()) as bar:
            run(bar)
    except KeyboardInterrupt as stop:
        print("Stopped: the same command resumes.")
        return screen.stopped(stop)
    finally:
        restore()
    return 0
