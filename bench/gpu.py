"""The only entry point that a machine with a GPU needs. Nothing needs to be installed there except
torch, triton, numpy and pytest.

    python -m bench.gpu                     a first run of 500 s, with the most important parts
                                            first
    python -m bench.gpu --summary FOLDER    print the summary of a run's results again
    python -m bench.gpu --dry-run           tiny sizes on the device that is here, to try the
                                            script itself

More of one kind, where there is more time:

    --stage tests       the tests on the GPU: the kernels, the loss, the integrations
    --stage sanitize    every kernel under compute-sanitizer: memcheck, racecheck
    --stage bench       speed and memory beside the baselines, over the real shapes
    --stage peers       the first two of them again, with the baselines that compile for minutes
    --stage profile     kernels of a step, host syncs, graphs, workspace, first call, training step
    --stage sweep       N × m, and the tiles of the Triton matmuls

Run it from the repository's root. It ends before --limit seconds. These files go into the folder
(--results, else GPU_OUT, else bench-out): the records, appended to one JSONL file as they are
measured, log.txt with the output of the parts, and summary.txt. Every part is a process with a
deadline in the plan. A part that fails or hangs loses only its own numbers, and a part that ends
early leaves its time to the next. Without .git, GIT_COMMIT names the commit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from . import ROOT, where
from .gpu_stages import LOG_FILE, PACKAGES, STAGES, Part, has_xdist

# seconds from the start of the command
LIMIT = 500.0
# seconds between asking a part to stop and ending it
GRACE = 3.0
# bytes of a part's output that are kept
LOG = 1 << 20


def environment(out: Path, dry: bool = False) -> dict[str, str]:
    """Return the environment of the parts: this checkout can be imported, results go to `out`, and
    their records belong to one run."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(PACKAGES)]
    extra = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "GPU_OUT": str(out),
        "PYTHONUNBUFFERED": "1",
        # Many processes run at the same time.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    # Triton does not look for a compiler of this name.
    known = "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))
    if not known and shutil.which("cc"):
        extra["CC"] = "cc"
    extra["BENCH_RUN"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return extra | ({"BENCH_DRY_RUN": "1"} if dry else {})


def run(part: Part, seconds: float, out: Path) -> int | None:
    """Return the exit status of a part, or None if it was ended after `seconds`."""
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
            # The process group is that part and its children.
            start_new_session=True,
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
            # Processes that it left behind would hold the device.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process that is stuck in the driver may survive that.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            _shorten(path, began)


def _shorten(path: Path, began: int) -> None:
    """Keep only the first and the last half of LOG bytes of the output of a part."""
    with path.open("r+b") as log:
        log.seek(began)
        text = log.read()
        if len(text) > LOG:
            log.seek(began)
            log.write(text[: LOG // 2] + b"\n[...]\n" + text[-LOG // 2 :])
            log.truncate()


def measure(stage: str, dry: bool, out: Path, limit: float, start: float) -> int:
    """Run the parts of a stage, and report each and all. Return 0, or the largest exit status of a
    part."""
    from pre_kernels import screen
    from pre_kernels.check.device import current

    from . import record, summary

    device = current()
    path = record.file(out, device)
    stamp = record.stamp(device)
    # The time to import torch from a cold disk does not count for any part.
    planned = time.monotonic() - start
    worst = 0

    def told() -> list[str]:
        """Return the summary, or why there is none: unexpected records must not end the run."""
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
        # A run that is killed at this point has all results so far.
        (out / "summary.txt").write_text("\n".join(told()) + "\n")
        print(f"== {name}: {outcome}, {seconds:.0f} s", flush=True)

    running = None
    began = start
    try:
        for part in STAGES[stage](dry, out):
            began = time.monotonic()
            planned += part.limit
            # The summary takes a moment at the end.
            left = min(planned, limit - 2.0) - (began - start)
            if left < 2 * GRACE:
                tell(part.name, "left out, no time was left", 0.0)
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
    except OSError as error:
        worst = 2
        print(f"The run ends here: {screen.why(error, path)}", file=sys.stderr)
    print("", *told(), f"{time.monotonic() - start:.0f} s in all, results in {out}", sep="\n")
    return worst


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("--stage", choices=STAGES, default=os.environ.get("GPU_STAGE", "all"))
    where.add_options(add)
    add(
        "--limit",
        type=float,
        default=LIMIT,
        help="end before this many seconds from the start of the command",
    )
    add("--dry-run", action="store_true", help="use tiny sizes; works without a GPU")
    add(
        "--summary",
        type=Path,
        metavar="FOLDER",
        help="print the summary of the last run in this folder, run nothing",
    )
    arguments = parser.parse_args(argv)
    stage = arguments.stage
    dry = arguments.dry_run

    # The import takes seconds from a cold disk, which count towards the limit.
    import torch

    from pre_kernels.check.device import current

    from . import summary

    if arguments.summary:
        print(*summary.of_folder(arguments.summary), sep="\n")
        return 0
    # argparse does not check defaults.
    if stage not in STAGES:
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
        out = where.folder(arguments.results, arguments.record).resolve()
        (out / LOG_FILE).open("a").close()
    except (OSError, ValueError) as error:
        print(f"The folder of the results cannot be written to: {error}", file=sys.stderr)
        return 2
    if not has_xdist():
        print(
            f"pytest-xdist is missing, here and in {PACKAGES} (`make peers`): "
            "tests run in one process.",
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
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())
