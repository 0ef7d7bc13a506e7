"""Measure the peak memory of a step on the CPU, as Linux counts it for the process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def _resident(field: str) -> float:
    """Return VmRSS (the current value) or VmHWM (the peak since the last reset), in MiB."""
    match = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert match, f"no {field} in {STATUS}"
    return int(match[1]) / 1024


def _trim() -> None:
    """Give freed memory back to the system; otherwise the second step would reuse it unseen."""
    gc.collect()
    # Other libcs do not have malloc_trim: small blocks may be reused then, while large ones are
    # mapped.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def missing() -> str | None:
    """Return why the peak cannot be read here, or None if it can."""
    return None if RESET.exists() else f"no {RESET} on this system"


def second(step: Callable[[], Any]) -> tuple[float, Any]:
    """Run a step twice; return how many MiB resident memory rose during the second, and what that
    step returned."""
    step()
    _trim()
    before = _resident("VmRSS")
    # This resets the peak to the memory that is resident here.
    RESET.write_text("5")
    returned = step()
    return _resident("VmHWM") - before, returned


def fresh(module: str, *arguments: str, folder: Path | None = None) -> dict[str, Any]:
    """Run a module in `folder` in its own process, and return the JSON that it prints last.

    That process maps large blocks one by one, so that only memory in use counts. By default glibc
    keeps some free memory, which varies by a seventh from run to run.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-500:]}")
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed
