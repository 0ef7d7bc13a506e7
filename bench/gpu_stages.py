"""The parts that each stage of `bench.gpu` runs. Each part is a process with a time limit, and the
most valuable come first.

Modules that import torch are only imported in the stages that need them: the import takes seconds
from a cold disk, which count towards the limit.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import ROOT

LOG_FILE = "log.txt"
# `make peers` installs packages there that a machine without a network may lack.
PACKAGES = ROOT / ".deps" / "peers"


class Part(NamedTuple):
    """A process of a stage, with its limit in seconds, the file for its output, and the variables
    that are added to the environment of every part."""

    name: str
    command: list[str]
    limit: float
    log: str = LOG_FILE
    settings: dict[str, str] = {}  # noqa: RUF012


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def has_xdist() -> bool:
    """Return whether tests can run in several processes."""
    return bool(importlib.util.find_spec("xdist")) or (PACKAGES / "xdist").exists()


def pytest(*arguments: str, workers: int = 1) -> list[str]:
    """Return the command of a test run, in several processes if xdist is there: Triton compiles
    hundreds of variants."""
    command = module(
        "pytest", "-p", "bench.live_report", "-q", "--tb=short", "-p", "no:cacheprovider"
    )
    if workers > 1 and has_xdist():
        # A worker that has lost the device ends, and another replaces it.
        command += ["-n", str(min(workers, os.cpu_count() or 1)), "--max-worker-restart", "200"]
    return [*command, *arguments]


def everything(dry: bool, out: Path) -> Iterator[Part]:
    """Return the parts of a first run. Their limits add up to 495 s. Parts that are likely to fail
    come after those whose result is needed in any case."""
    main = "tiny" if dry else "llava15-7b-sft"
    small = "tiny" if dry else "qwen25vl-7b-small"
    dtype = "fp32" if dry else "bf16"
    size = ["--shape", main, "--dtype", dtype]
    cores = 1 if dry else 14

    def suite(name: str, limit: float, shape: str, names: list[str], *more: str) -> Part:
        # On a CPU no other implementation of ours runs.
        names = [*names, "ours-torch"] if dry else names
        return Part(name, module("bench.suite", shape, dtype, "--peers", *names, *more), limit)

    yield Part("ceilings", module("bench.profiling", "ceilings", *size), 15)
    check = ["--impl", "torch", "--width", "64", "--rows", "64"] if dry else []
    yield Part("check", module("pre_kernels", "check", "--out", str(out), *check), 42)
    yield suite("blas", 35, main, ["floor", "eager", "ours-blas", "ours-fp8"])
    yield suite(
        "triton", 35, main, ["floor", "ours-triton"], "--rows", "index", "mask", "--seconds", "3"
    )
    yield suite(
        "N = 256", 20, small, ["floor", "eager", "ours-blas", "ours-triton"], "--seconds", "3"
    )
    files = [
        f"tests/core/test_{name}.py" for name in ("kernels", "row_kernels", "fp8", "memory_safety")
    ]
    few = ["-k", "scatter and 130 or choose"] if dry else []
    yield Part("kernel tests", pytest(*files, *few, workers=cores), 55)
    few = "torch and no_rows_with_zero" if dry else "not random_options"
    yield Part("loss tests", pytest("tests/core/test_loss.py", "-k", few, workers=cores), 56)
    yield Part("guarantees", module("bench.profiling", "syncs", *size), 40)
    names = ["floor", "ours-torch"] if dry else ["floor", "ours-blas", "ours-triton", "ours-fp8"]
    yield Part("kernel times", module("bench.profiling", "kernels", *size, "--peers", *names), 22)
    tile = (
        ["--n", "80", "--d", "64", "--m", "96", "--dtype", dtype]
        if dry
        else ["--kinds", "descriptor"]
    )
    for role in ("project", "weight_grad"):
        yield Part(
            f"tiles: {role}",
            module("bench.tile_sweep", "tiles", "--role", role, *tile, "--most", "5"),
            24,
        )
    yield suite("compile", 45, main, ["floor", "eager", "ours-blas", "viral" if dry else "compile"])
    names = ["ours-torch"] if dry else ["ours-blas", "ours-triton"]
    mibs = ["--mib", *(["64"] if dry else ["64", "256", "512", "1024"])]
    yield Part(
        "workspace", module("bench.profiling", "workspace", *size, "--peers", *names, *mibs), 40
    )
    yield suite(
        "hot caches", 14, main, ["floor", "ours-blas", "ours-triton"], "--hot", "--seconds", "1"
    )
    yield Part("fullgraph", module("bench.profiling", "fullgraph", *size), 12)
    few = "torch and random_options and 119" if dry else "random_options"
    yield Part("random options", pytest("tests/core/test_loss.py", "-k", few, workers=cores), 8)
    yield from _ncu(size, 8)


def _ncu(size: list[str], limit: float) -> Iterator[Part]:
    if not shutil.which("ncu"):
        return
    options = "--clock-control none --profile-from-start off --launch-count 40"
    sections = "SpeedOfLight LaunchStats Occupancy MemoryWorkloadAnalysis WarpStateStats"
    command = ["ncu", *options.split()]
    command += [word for name in sections.split() for word in ("--section", name)]
    yield Part("ncu", [*command, *module("bench.profiling", "once", *size)], limit, "ncu.txt")


def tests(dry: bool, out: Path) -> Iterator[Part]:
    """Return the tests of the loss, then those that run models."""
    if dry:
        yield Part(
            "loss", pytest("tests/core/test_loss.py", "-k", "torch and no_rows_with_zero"), 60
        )
        return
    yield Part("loss", pytest("tests/core/test_loss.py", workers=12), 400)
    # Compilation ahead of time and the tests of the measurements show nothing new on a GPU.
    done = ["tests/core/test_loss.py", "tests/core/test_compile.py", "tests/bench"]
    yield Part("others", pytest("tests", *(f"--ignore={name}" for name in done), workers=12), 400)


def sanitizer() -> str | None:
    """Return the path of compute-sanitizer, which the CUDA toolkit does not put on every PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [Path(home, "bin") for home in (*homes, "/usr/local/cuda")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, folders))
    )


def sanitize(dry: bool, out: Path) -> Iterator[Part]:
    """Return parts that run each kernel under compute-sanitizer, in the small sizes of its tests
    between fences. Every tensor is an allocation of its own, since within the blocks that torch
    caches an access beyond a tensor would not be an error."""
    tool = sanitizer()
    if tool is None:
        print(
            "== compute-sanitizer is missing: neither on PATH nor in CUDA_HOME; "
            "no memcheck, no racecheck",
            flush=True,
        )
    command = pytest("tests/core/test_memory_safety.py", "-k")
    if dry:
        yield Part("fences", [*command, "between_fences and scatters and 130"], 60)
        return
    for check in ("memcheck", "racecheck") if tool else ():
        options = ["--tool", check, "--target-processes", "all", "--error-exitcode", "99"]
        checked = [str(tool), *options, *command, "between_fences"]
        yield Part(check, checked, 240, settings={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def bench(dry: bool, out: Path) -> Iterator[Part]:
    from pre_kernels.check.device import current

    from . import baselines, shapes

    if dry:
        few = ["--rows", *shapes.ROWS, "--peers", "ours-torch", "floor"]
        yield Part("tiny", module("bench.suite", "tiny", "fp32", *few), 60)
        return
    for number, (shape, dtype, rows) in enumerate(shapes.plan(current().torch_device)):
        names = baselines.planned(max(number, baselines.COSTLY))
        command = module("bench.suite", shape.name, dtype, "--rows", rows, "--peers", *names)
        yield Part(f"{shape.name} {dtype} {rows}", command, 100)


def costly(dry: bool, out: Path) -> Iterator[Part]:
    """Return parts that measure all baselines side by side. Their results replace those of `bench`
    for these shapes. QuACK tunes its kernels at the first call, so it comes last and separately:
    however long that takes, the others keep their times."""
    from pre_kernels.check.device import current

    from . import baselines, shapes

    if dry:
        yield Part(
            "tiny", module("bench.suite", "tiny", "fp32", "--peers", "viral", "eager", "floor"), 60
        )
        return
    plan = shapes.plan(current().torch_device)[: baselines.COSTLY]
    for number, (shape, dtype, rows) in enumerate(plan):
        names = [name for name in baselines.planned(number) if name != "quack"]
        command = module("bench.suite", shape.name, dtype, "--rows", rows, "--peers", *names)
        yield Part(f"{shape.name} {dtype} {rows}", command, 245)
    for shape, dtype, rows in plan:
        names = ["floor", "quack"]
        command = module("bench.suite", shape.name, dtype, "--rows", rows, "--peers", *names)
        yield Part(f"{shape.name} {dtype} {rows} quack", command, 120)


def profile(dry: bool, out: Path) -> Iterator[Part]:
    size = ["--shape", "tiny", "--dtype", "fp32"] if dry else []
    for what in ("syncs", "fullgraph"):
        yield Part(what, module("bench.profiling", what, *size), 80)
    for where in [size] if dry else [[], ["--shape", "qwen25vl-7b-small"]]:
        yield Part("kernels", module("bench.profiling", "kernels", *where), 60)
    few = ["--peers", "ours-torch", "eager", "--mib", "64"] if dry else []
    yield Part("workspace", module("bench.profiling", "workspace", *size, *few), 110)
    yield Part("first call", module("bench.profiling", "firstcall", *size), 150)
    yield from _ncu(size, 150)
    yield Part("training", module("bench.training", *(["--tiny"] if dry else [])), 150)


def sweep(dry: bool, out: Path) -> Iterator[Part]:
    from .tile_sweep import NS, ROLES

    small = ["--d", "64", "--dtype", "fp32"] if dry else []
    for role in ROLES:
        size = [*small, *(["--n", "80", "--m", "96"] * dry)]
        yield Part(
            f"tiles: {role}", module("bench.tile_sweep", "tiles", "--role", role, *size), 110
        )
    for n in (80,) if dry else NS:
        yield Part(f"N = {n}", module("bench.tile_sweep", "sizes", "--n", str(n), *small), 60)


STAGES = {
    "all": everything,
    "tests": tests,
    "sanitize": sanitize,
    "bench": bench,
    "peers": costly,
    "profile": profile,
    "sweep": sweep,
}
