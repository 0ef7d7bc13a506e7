"""The one entry for a machine with a GPU, on which nothing needs to be installed but torch, triton,
numpy and pytest.

    python -m bench.gpu                     all that a first run of 500 s can tell, in the order of its worth
    python -m bench.gpu --summary FOLDER    the summary of a run's results once more
    python -m bench.gpu --dry-run           tiny sizes on whatever is here, to try the script itself

More of one kind, where there is more time:

    --stage tests       the tests on the GPU: the kernels, the loss, the integrations
    --stage sanitize    every kernel under compute-sanitizer: memcheck, racecheck
    --stage bench       speed and memory beside the peers, over the real shapes
    --stage peers       the first two of them again, with the peers that compile for minutes
    --stage profile     kernels of a step, host syncs, graphs, workspace, first call, training step
    --stage sweep       N × m, and the tiles of the Triton products

Run from the repository's root; it ends before --limit seconds. Into the folder (--out, else
GPU_OUT, else bench/results) go the records, appended to one JSONL file as they are measured,
log.txt, what the parts printed, and summary.txt. Every part is a process that has to end by its
place in the plan: one that fails or hangs costs its own figures alone, one that ends early leaves
its time to the next. Where there is no .git, GIT_COMMIT names the commit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from . import ROOT

LIMIT = 500.0  # seconds from the start of the command
GRACE = 3.0  # between asking a part to stop and ending it
LOG_FILE, LOG = "log.txt", 1 << 20  # bytes kept of what a part prints
PEERS = (
    ROOT / ".deps" / "peers"
)  # `make peers` puts there what a machine without a network may lack


class Part(NamedTuple):
    """A process of a stage."""

    name: str
    command: list[str]
    limit: float  # seconds
    log: str = LOG_FILE  # for its output
    settings: dict[str, str] = {}  # noqa: RUF012  of its environment, beside those of every part


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _in_processes() -> bool:
    """Whether tests can run in several."""
    return bool(importlib.util.find_spec("xdist")) or (PEERS / "xdist").exists()


def _pytest(*arguments: str, workers: int = 1) -> list[str]:
    """In several processes if xdist is there: Triton compiles hundreds of variants."""
    command = _module(
        "pytest", "-p", "bench.live_report", "-q", "--tb=short", "-p", "no:cacheprovider"
    )
    if workers > 1 and _in_processes():
        # one that has lost the device ends, and another takes its place
        command += ["-n", str(min(workers, os.cpu_count() or 1)), "--max-worker-restart", "200"]
    return [*command, *arguments]


def everything(dry: bool, out: Path) -> Iterator[Part]:
    """The limits add up to 495 s. What is likely to fail comes after what is to be known in any
    case."""
    main, small, dtype = (
        ("tiny", "tiny", "fp32") if dry else ("llava15-7b-sft", "qwen25vl-7b-small", "bf16")
    )
    size, cores = ["--shape", main, "--dtype", dtype], 1 if dry else 14

    def suite(name: str, limit: float, shape: str, peers: list[str], *more: str) -> Part:
        peers = [*peers, "ours-torch"] if dry else peers  # a CPU has none of the others
        return Part(name, _module("bench.suite", shape, dtype, "--peers", *peers, *more), limit)

    yield Part("ceilings", _module("bench.profiling", "ceilings", *size), 15)
    check = ["--impl", "torch", "--width", "64", "--rows", "64"] if dry else []
    yield Part("check", _module("pre_kernels.cli", "check", "--out", str(out), *check), 42)
    yield suite("blas", 35, main, ["floor", "eager", "ours-blas", "ours-fp8"])
    yield suite(
        "triton", 35, main, ["floor", "ours-triton"], "--rows", "index", "mask", "--seconds", "3"
    )
    yield suite(
        "N = 256", 20, small, ["floor", "eager", "ours-blas", "ours-triton"], "--seconds", "3"
    )
    files = [f"tests/test_{name}.py" for name in ("kernels", "row_kernels", "fp8", "memory_safety")]
    few = ["-k", "scatter and 130 or choose"] if dry else []
    yield Part("kernel tests", _pytest(*files, *few, workers=cores), 55)
    few = "torch and no_rows_with_zero" if dry else "not random_options"
    yield Part("loss tests", _pytest("tests/core/test_loss.py", "-k", few, workers=cores), 56)
    yield Part("guarantees", _module("bench.profiling", "syncs", *size), 40)
    peers = ["floor", "ours-torch"] if dry else ["floor", "ours-blas", "ours-triton", "ours-fp8"]
    yield Part("kernel times", _module("bench.profiling", "kernels", *size, "--peers", *peers), 22)
    tile = (
        ["--n", "80", "--d", "64", "--m", "96", "--dtype", dtype]
        if dry
        else ["--kinds", "descriptor"]
    )
    for role in ("project", "weight_grad"):
        yield Part(
            f"tiles: {role}",
            _module("bench.tile_sweep", "tiles", "--role", role, *tile, "--most", "5"),
            24,
        )
    yield suite("compile", 45, main, ["floor", "eager", "ours-blas", "viral" if dry else "compile"])
    peers = ["ours-torch"] if dry else ["ours-blas", "ours-triton"]
    mibs = ["--mib", *(["64"] if dry else ["64", "256", "512", "1024"])]
    yield Part(
        "workspace", _module("bench.profiling", "workspace", *size, "--peers", *peers, *mibs), 40
    )
    yield suite(
        "hot caches", 14, main, ["floor", "ours-blas", "ours-triton"], "--hot", "--seconds", "1"
    )
    yield Part("fullgraph", _module("bench.profiling", "fullgraph", *size), 12)
    few = "torch and random_options and 119" if dry else "random_options"
    yield Part("random options", _pytest("tests/core/test_loss.py", "-k", few, workers=cores), 8)
    yield from _ncu(size, 8)


def _ncu(size: list[str], limit: float) -> Iterator[Part]:
    if shutil.which("ncu"):
        sections = (
            "SpeedOfLight",
            "LaunchStats",
            "Occupancy",
            "MemoryWorkloadAnalysis",
            "WarpStateStats",
        )
        command = [
            "ncu",
            "--clock-control",
            "none",
            "--profile-from-start",
            "off",
            "--launch-count",
            "40",
        ]
        command += [word for name in sections for word in ("--section", name)]
        yield Part("ncu", [*command, *_module("bench.profiling", "once", *size)], limit, "ncu.txt")


def tests(dry: bool, out: Path) -> Iterator[Part]:
    """The loss first, then what runs models."""
    if dry:
        yield Part(
            "loss", _pytest("tests/core/test_loss.py", "-k", "torch and no_rows_with_zero"), 60
        )
        return
    yield Part("loss", _pytest("tests/core/test_loss.py", workers=12), 400)
    # compiling ahead of time and the benchmark's own tests say nothing new on a GPU
    done = ["tests/core/test_loss.py", "tests/core/test_compile.py", "tests/test_bench*.py"]
    yield Part(
        "others", _pytest("tests", *(f"--ignore-glob={name}" for name in done), workers=12), 400
    )


def sanitizer() -> str | None:
    """compute-sanitizer of the CUDA toolkit, which does not put it on every PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [Path(home, "bin") for home in (*homes, "/usr/local/cuda")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, folders))
    )


def sanitize(dry: bool, out: Path) -> Iterator[Part]:
    """Each kernel in the small sizes of its fences, which run without them too. Every tensor an
    allocation of its own: within the blocks that torch caches an access beyond a tensor is no
    error."""
    tool = sanitizer()
    if tool is None:
        print(
            "== compute-sanitizer is missing: neither on PATH nor in CUDA_HOME; no memcheck, no racecheck",
            flush=True,
        )
    command = _pytest("tests/core/test_memory_safety.py", "-k")
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
        peer = ["--rows", *shapes.ROWS, "--peers", "ours-torch", "floor"]
        yield Part("tiny", _module("bench.suite", "tiny", "fp32", *peer), 60)
        return
    for number, (shape, dtype, rows) in enumerate(shapes.plan(current().torch_device)):
        names = baselines.planned(max(number, baselines.COSTLY))
        command = _module("bench.suite", shape.name, dtype, "--rows", rows, "--peers", *names)
        yield Part(f"{shape.name} {dtype} {rows}", command, 100)


def costly(dry: bool, out: Path) -> Iterator[Part]:
    """All peers side by side: what this finds replaces what `bench` found for these shapes."""
    from pre_kernels.check.device import current

    from . import baselines, shapes

    if dry:
        yield Part(
            "tiny", _module("bench.suite", "tiny", "fp32", "--peers", "viral", "eager", "floor"), 60
        )
        return
    for number, (shape, dtype, rows) in enumerate(
        shapes.plan(current().torch_device)[: baselines.COSTLY]
    ):
        command = _module(
            "bench.suite", shape.name, dtype, "--rows", rows, "--peers", *baselines.planned(number)
        )
        yield Part(f"{shape.name} {dtype} {rows}", command, 245)


def profile(dry: bool, out: Path) -> Iterator[Part]:
    size = ["--shape", "tiny", "--dtype", "fp32"] if dry else []
    for what in ("syncs", "fullgraph"):
        yield Part(what, _module("bench.profiling", what, *size), 80)
    for where in [size] if dry else [[], ["--shape", "qwen25vl-7b-small"]]:
        yield Part("kernels", _module("bench.profiling", "kernels", *where), 60)
    few = ["--peers", "ours-torch", "eager", "--mib", "64"] if dry else []
    yield Part("workspace", _module("bench.profiling", "workspace", *size, *few), 110)
    yield Part("first call", _module("bench.profiling", "firstcall", *size), 150)
    yield from _ncu(size, 150)
    yield Part("training", _module("bench.training", *(["--tiny"] if dry else [])), 150)


def sweep(dry: bool, out: Path) -> Iterator[Part]:
    from .tile_sweep import NS, ROLES

    small = ["--d", "64", "--dtype", "fp32"] if dry else []
    for role in ROLES:
        size = [*small, *(["--n", "80", "--m", "96"] * dry)]
        yield Part(
            f"tiles: {role}", _module("bench.tile_sweep", "tiles", "--role", role, *size), 110
        )
    for n in (80,) if dry else NS:
        yield Part(f"N = {n}", _module("bench.tile_sweep", "sizes", "--n", str(n), *small), 60)


STAGES = {
    "all": everything,
    "tests": tests,
    "sanitize": sanitize,
    "bench": bench,
    "peers": costly,
    "profile": profile,
    "sweep": sweep,
}


def environment(out: Path, dry: bool = False) -> dict[str, str]:
    """For the parts: this checkout importable, results to `out`, their records
    those of one run."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(PEERS)]
    extra = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "GPU_OUT": str(out),
        "PYTHONUNBUFFERED": "1",
    }
    extra["OMP_NUM_THREADS"] = os.environ.get(
        "OMP_NUM_THREADS", "1"
    )  # of each of many processes at once
    if (
        not any(map(shutil.which, ("gcc", "clang")))
        and "CC" not in os.environ
        and shutil.which("cc")
    ):
        extra["CC"] = "cc"  # which Triton does not look for
    extra["BENCH_RUN"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return extra | ({"BENCH_DRY_RUN": "1"} if dry else {})


def run(part: Part, seconds: float, out: Path) -> int | None:
    """The exit status of a part, or None if it had to be ended within `seconds`."""
    path = out / part.log
    with path.open("a") as log:
        began = log.tell()
        log.write(f"== {part.name}: {' '.join(part.command)}\n")
        log.flush()
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=os.environ | part.settings,
            stdout=log,
            stderr=log,
            start_new_session=True,  # the group is that part and its children
        )
        try:
            return process.wait(max(seconds - GRACE, 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            with contextlib.suppress(
                ProcessLookupError
            ):  # whom it left behind would hold the device
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # one stuck in the driver may outlive that
                process.wait(GRACE)
            _shorten(path, began)


def _shorten(path: Path, began: int) -> None:
    """Of what a part printed the first and the last half of LOG bytes are kept."""
    with path.open("r+b") as log:
        log.seek(began)
        text = log.read()
        if len(text) > LOG:
            log.seek(began)
            log.write(text[: LOG // 2] + b"\n[...]\n" + text[-LOG // 2 :])
            log.truncate()


def measure(stage: str, dry: bool, out: Path, limit: float, start: float) -> int:
    """Run the parts of a stage, tell of each and of all; 0, or the largest exit status of a
    part."""
    from pre_kernels.check.device import current

    from . import record, summary

    device = current()
    path, stamp = record.file(out, device), record.stamp(device)
    planned, worst = time.monotonic() - start, 0  # an import of torch from a cold disk is no part's

    def told() -> list[str]:
        """The summary, or why there is none: figures that it does not expect must not end the
        run."""
        try:
            return summary.of_folder(out)
        except Exception:
            return ["no summary:", *traceback.format_exc().splitlines()[-20:]]

    def tell(name: str, outcome: str, seconds: float) -> None:
        record.append(
            path,
            {"kind": "part", "item": name, "outcome": outcome, "seconds": round(seconds, 1)}
            | stamp,
        )
        (out / "summary.txt").write_text("\n".join(told()) + "\n")  # for a run that is killed
        print(f"== {name}: {outcome}, {seconds:.0f} s", flush=True)

    running, began = None, start
    try:
        for part in STAGES[stage](dry, out):
            began = time.monotonic()
            planned += part.limit
            left = min(planned, limit - 2.0) - (began - start)  # the summary takes a moment
            if left < 2 * GRACE:
                tell(part.name, "left out, no time", 0.0)
                continue
            running = part
            status = run(part, left, out)
            running = None
            outcome = "ended at its limit" if status is None else f"exit {status}"
            tell(part.name, outcome, time.monotonic() - began)
            worst = max(worst, 1 if status is None else min(abs(status), 125))
    except KeyboardInterrupt:
        worst = 130
        if running:
            tell(running.name, "stopped with the run", time.monotonic() - began)
    print("", *told(), f"{time.monotonic() - start:.0f} s in all, results in {out}", sep="\n")
    return worst


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, default=os.environ.get("GPU_STAGE", "all"))
    parser.add_argument("--out", help="folder of the results; else GPU_OUT, else bench/results")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds from the start of the command"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="FOLDER",
        help="print that of the last run there, run nothing",
    )
    arguments = parser.parse_args(argv)
    stage, dry = arguments.stage, arguments.dry_run

    import torch

    from pre_kernels.check.device import current

    from . import record, summary

    if arguments.summary:
        print(*summary.of_folder(arguments.summary), sep="\n")
        return 0
    if stage not in STAGES:  # a default is not checked by argparse
        parser.error(f"GPU_STAGE: got {stage!r}, want one of {', '.join(STAGES)}")
    if current().kind == "cpu" and not dry:
        why = (
            "TRITON_INTERPRET=1 leaves it alone"
            if torch.cuda.is_available()
            else "torch can use none"
        )
        print(f"No GPU, {why}; --dry-run tries the script on the CPU.", file=sys.stderr)
        return 2
    try:
        out = record.folder(arguments.out).resolve()
        (out / LOG_FILE).open("a").close()
    except OSError as error:
        print(f"The folder of the results cannot be written to: {error}", file=sys.stderr)
        return 2
    if not _in_processes():
        print(
            f"pytest-xdist is missing, here and in {PEERS} (`make peers`): tests run in one process.",
            flush=True,
        )
    if importlib.util.find_spec("triton") is None:
        print(
            "triton is not installed: of ours only impl='torch' can run, and no kernel is tested.",
            flush=True,
        )

    handlers = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with mock.patch.dict(os.environ, environment(out, dry)):
            return measure(stage, dry, out, arguments.limit, start)
    except OSError as error:
        print(f"The run ends here: {error}", file=sys.stderr)
        return 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())
