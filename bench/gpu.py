"""The one entry for a machine with a GPU, on which nothing needs to be installed but torch, triton and pytest.

    python -m bench.gpu --stage tests       the tests on the GPU: the kernels, the loss, the integrations
    python -m bench.gpu --stage sanitize    every kernel under compute-sanitizer: memcheck, racecheck
    python -m bench.gpu --stage bench       speed and memory beside the peers, over the real shapes
    python -m bench.gpu --stage peers       the first two of them again, with the peers that compile for minutes
    python -m bench.gpu --stage profile     kernels of a step, host syncs, graphs, workspace, first call, training step
    python -m bench.gpu --stage sweep       N × m, and the tiles of the Triton products
    GPU_STAGE=bench GPU_OUT=results python -m bench.gpu
    python -m bench.gpu --stage sweep --dry-run     tiny sizes on whatever is here, to try the script itself

Run from the repository's root. Each stage ends before --limit seconds; results are appended as they come to one JSONL
file in GPU_OUT (else bench/results). Every part runs in a process of its own: one that crashes or hangs costs its own
figures alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import ROOT

LIMIT = 510.0  # seconds of a stage
GRACE = 10.0  # between asking a part to stop and ending it
UNINSTALLED = Path(__file__).with_name("uninstalled")
PEERS = ROOT / ".deps" / "peers"  # `make peers` puts there what is compared with, for a machine without a network


class Part(NamedTuple):
    """A process of a stage."""

    command: list[str]
    limit: float  # seconds
    log: str | None = None  # file for its output; None: the screen
    settings: dict[str, str] = {}  # noqa: RUF012  of its environment, beside those of every part


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def tests(dry: bool, out: Path) -> Iterator[Part]:
    """The loss first, then what runs models. Triton compiles hundreds of variants: in parallel if xdist is there."""
    command = _module("pytest", "-p", "bench.live_report", "-q", "--tb=short", "-p", "no:cacheprovider")
    if importlib.util.find_spec("xdist") and not dry:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    if dry:
        yield Part([*command, "tests/test_loss.py", "-k", "torch and no_rows_with_zero"], 60)
        return
    yield Part([*command, "tests/test_loss.py"], 400)
    # compiling ahead of time and the benchmark's own tests say nothing new on a GPU
    done = ("test_loss", "test_compile", "test_bench", "test_bench_diagnostics", "test_bench_gpu", "test_bench_report")
    yield Part([*command, "tests", *(f"--ignore=tests/{name}.py" for name in done)], 400)


def sanitizer() -> str | None:
    """compute-sanitizer of the CUDA toolkit, which does not put it on every PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [Path(home, "bin") for home in (*homes, "/usr/local/cuda")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, folders))
    )


def sanitize(dry: bool, out: Path) -> Iterator[Part]:
    """Each kernel in the small sizes of its fences, which run without them too. Every tensor an allocation of its own:
    within the blocks that torch caches an access beyond a tensor is no error."""
    tool = sanitizer()
    if tool is None:
        print(
            "== compute-sanitizer is missing: neither on PATH nor in CUDA_HOME; no memcheck, no racecheck", flush=True
        )
    command = _module("pytest", "-p", "bench.live_report", "-q", "--tb=short", "-p", "no:cacheprovider")
    command += ["tests/test_memory_safety.py", "-k"]
    if dry:
        yield Part([*command, "between_fences and scatters and 130"], 60)
        return
    for check in ("memcheck", "racecheck") if tool else ():
        options = ["--tool", check, "--target-processes", "all", "--error-exitcode", "99"]
        yield Part(
            [str(tool), *options, *command, "between_fences"], 240, None, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        )


def bench(dry: bool, out: Path) -> Iterator[Part]:
    from pre_kernels.check.device import current

    from . import peers, shapes

    if dry:
        for rows in shapes.ROWS:
            yield Part(_module("bench.suite", "tiny", "fp32", "--rows", rows, "--peers", "ours-torch", "floor"), 60)
        return
    for number, (shape, dtype, rows) in enumerate(shapes.plan(current().torch_device)):
        names = peers.planned(max(number, peers.COSTLY))
        yield Part(_module("bench.suite", shape.name, dtype, "--rows", rows, "--peers", *names), 100)


def costly(dry: bool, out: Path) -> Iterator[Part]:
    """All peers side by side: what this finds replaces what `bench` found for these shapes."""
    from pre_kernels.check.device import current

    from . import peers, shapes

    if dry:
        yield Part(_module("bench.suite", "tiny", "fp32", "--peers", "viral", "eager", "floor"), 60)
        return
    for number, (shape, dtype, rows) in enumerate(shapes.plan(current().torch_device)[: peers.COSTLY]):
        names = peers.planned(number)
        yield Part(_module("bench.suite", shape.name, dtype, "--rows", rows, "--peers", *names), 245)


def profile(dry: bool, out: Path) -> Iterator[Part]:
    size = ["--shape", "tiny", "--dtype", "fp32"] if dry else []
    yield Part(_module("bench.profiling", "syncs", *size), 120)
    for where in [size] if dry else [[], ["--shape", "qwen25vl-7b-small"]]:
        yield Part(_module("bench.profiling", "kernels", *where), 60)
    yield Part(_module("bench.profiling", "workspace", *size), 110)
    yield Part(_module("bench.profiling", "firstcall", *size), 150)
    yield Part(_module("bench.training", *(["--tiny"] if dry else [])), 150)
    if shutil.which("ncu"):
        sections = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
        command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "40"]
        command += [word for name in sections for word in ("--section", name)]
        yield Part([*command, *_module("bench.profiling", "once", *size)], 150, "ncu.txt")


def sweep(dry: bool, out: Path) -> Iterator[Part]:
    from .sweep import NS, ROLES

    small = ["--d", "64", "--dtype", "fp32"] if dry else []
    for role in ROLES:
        yield Part(_module("bench.sweep", "tiles", "--role", role, *small, *(["--n", "80", "--m", "96"] * dry)), 110)
    for n in (80,) if dry else NS:
        yield Part(_module("bench.sweep", "sizes", "--n", str(n), *small), 60)


STAGES = {"tests": tests, "sanitize": sanitize, "bench": bench, "peers": costly, "profile": profile, "sweep": sweep}


def environment(out: Path, dry: bool = False) -> dict[str, str]:
    """For the parts: this checkout importable as if installed, results to `out`."""
    paths = [str(UNINSTALLED), str(ROOT), os.environ.get("PYTHONPATH", ""), str(PEERS)]
    extra = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "GPU_OUT": str(out), "PYTHONUNBUFFERED": "1"}
    return os.environ | extra | ({"BENCH_DRY_RUN": "1"} if dry else {})


def run(part: Part, seconds: float, out: Path, dry: bool = False) -> int | None:
    """The exit status of a part, or None if it had to be ended after `seconds`."""
    log = (out / part.log).open("w") if part.log else None
    try:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment(out, dry) | part.settings,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            for how in (signal.SIGINT, signal.SIGKILL):  # its own session: the group is that part and its children
                os.killpg(process.pid, how)
                try:
                    process.wait(GRACE)
                    break
                except subprocess.TimeoutExpired:
                    continue
            return None
    finally:
        if log:
            log.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default=os.environ.get("GPU_STAGE", "tests"))
    parser.add_argument("--out", help="folder of the results; else GPU_OUT, else bench/results")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of the stage")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, also without a GPU")
    arguments = parser.parse_args(argv)
    start = time.monotonic()

    import torch

    from . import record

    if arguments.stage not in STAGES:  # a default is not checked by argparse
        parser.error(f"GPU_STAGE: got {arguments.stage!r}, want one of {', '.join(STAGES)}")
    if not torch.cuda.is_available() and not arguments.dry_run:
        print("No GPU that torch can use here; --dry-run tries the script on the CPU.", file=sys.stderr)
        return 2

    out = record.folder(arguments.out).resolve()
    worst = 0
    for part in STAGES[arguments.stage](arguments.dry_run, out):
        left = arguments.limit - GRACE - (time.monotonic() - start)
        name = " ".join(part.command[1:])
        if left < 10:
            print(f"== left out, no time: {name}", flush=True)
            continue
        began = time.monotonic()
        print(f"== {name}", flush=True)
        status = run(part, min(left, part.limit), out, arguments.dry_run)
        outcome = "ended: out of time" if status is None else f"exit {status}"
        print(f"== {outcome} after {time.monotonic() - began:.0f} s", flush=True)
        worst = max(worst, 1 if status is None else abs(status))
    print(f"== stage {arguments.stage}: {time.monotonic() - start:.0f} s, results in {out}", flush=True)
    return min(worst, 125)


if __name__ == "__main__":
    raise SystemExit(main())
