"""The two kinds of device behind one interface: how to time a step, and what to record about the
machine."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pre_kernels.fused.products import HALF_UNITS

MIB = 2**20
# This many bytes are written between samples, several times the L2 cache of any GPU so far.
FLUSH = 512 * MIB
# This variable is set once nvidia-smi was too slow, so that child processes do not wait for it
# again.
SILENT = "PRE_KERNELS_NO_SMI"
# The GPU spins for this many clock cycles, about 2 ms, while the host queues the step.
HEAD_START = 4_000_000


class Cpu:
    kind = "cpu"
    torch_device = torch.device("cpu")

    def describe(self) -> dict[str, Any]:
        units = f"with {HALF_UNITS}" if HALF_UNITS else "without half-precision units"
        return {"device": f"{_cpu_name()} {units}", "threads": torch.get_num_threads()}

    def synchronize(self) -> None:
        pass

    def sample(self, step: Callable[[], Any]) -> float:
        """Return the milliseconds of one step."""
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3

    def free(self) -> int | None:
        """Return the bytes that can still be allocated, or None where the system does not say."""
        match = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
        return int(match[1]) << 10 if match else None

    def enqueue_us(self, step: Callable[[], Any]) -> float | None:
        """Return None: on a CPU a step is done when it returns."""
        return None

    @contextlib.contextmanager
    def syncs_forbidden(self) -> Iterator[None]:
        yield


class Cuda:
    kind = "cuda"
    torch_device = torch.device("cuda")

    @cached_property
    def scratch(self) -> torch.Tensor:
        return torch.empty(FLUSH, dtype=torch.int8, device="cuda")

    def describe(self) -> dict[str, Any]:
        """Return the card and its clocks at this moment, just after work, without changing a
        setting.

        A value that cannot be read, for example after a kernel's illegal access, is missing or
        None.
        """
        said: dict[str, Any] = {
            "device": "a GPU",
            "cuda": torch.version.cuda or torch.version.hip,
            **_card(),
        }
        with contextlib.suppress(RuntimeError):
            said["device"] = torch.cuda.get_device_name()
            said["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        return said

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> int | None:
        """Return the bytes that can still be allocated."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def sample(self, step: Callable[[], Any]) -> float:
        """Return the milliseconds of one step between two events, from a cold L2 cache and with its
        launches queued ahead.

        A step that makes the host wait (for a mask's count, say) loses its head start there, and
        pays for it as it would in training.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.zero_()
        _spin()
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def enqueue_us(self, step: Callable[[], Any]) -> float | None:
        """Return the microseconds in which the host queues a step while the GPU is busy with
        something else, as the median of a few. A step that makes the host wait counts the wait
        too."""
        samples = []
        for _ in range(5):
            torch.cuda.synchronize()
            _spin()
            start = time.perf_counter()
            step()
            samples.append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()
        return statistics.median(samples)

    def peak(self, step: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[float, float]:
        """Return the MiB allocated at the peak of a step beyond those before it, and the MiB of the
        returned gradients."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        returned = step()
        torch.cuda.synchronize()
        kept = sum(x.nbytes for x in returned)
        return (torch.cuda.max_memory_allocated() - before) / MIB, kept / MIB

    @contextlib.contextmanager
    def syncs_forbidden(self) -> Iterator[None]:
        """Raise where PyTorch makes the host wait for the device."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            # PyTorch warns that this is a prototype.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)


def current() -> Cpu | Cuda:
    """Return the GPU if there is one, unless kernels are interpreted."""
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return Cuda()
    return Cpu()


def _spin() -> None:
    if hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(HEAD_START)


def _card() -> dict[str, str | None]:
    """Return what nvidia-smi reports about the first card, with None for whatever it does not
    report in time."""
    names = (
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "power.draw",
        "temperature.gpu",
    )
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    out = ""
    try:
        if SILENT not in os.environ:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
            out = done.stdout
    except (OSError, subprocess.CalledProcessError):
        # A failed call prints the reason instead of the values.
        pass
    except subprocess.TimeoutExpired:
        os.environ[SILENT] = "1"
    values = [value.strip() for value in out.splitlines()[0].split(",")] if out else []
    return dict.fromkeys(names) | dict(zip(names, values, strict=False))


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # Only Linux has these files.
        return ""
