"""A fuzz campaign: it compares loss and gradients of drawn cases with float64, by the error rule of
the tests.

    python -m bench.fuzz --cases 11500 --seed 1 --jobs 2   a line for each group of cases into
                                                           bench-out/fuzz.jsonl, with --record
                                                           into bench/results
    python -m bench.fuzz --case '{"dtype": "float16", …}'  one case again, from a violation's `spec`

Cases come in blocks, each with its own seed. Every block is kept in build/fuzz as soon as it is
done, so the same command resumes where it was stopped. Without a GPU the kernels are interpreted,
and most cases take the torch path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pre_kernels import screen, sources
from pre_kernels.check.device import current

from . import ROOT, fuzz_table, record, where
from .tables import markdown, plain_table

FRACTIONS = {"torch": 0.95, "triton": 0.025, "blas": 0.025}
# Cases in a block. They take some seconds.
BLOCK = {"torch": 100, "triton": 10, "blas": 20}
# Files that draw a case and judge it, besides the sources that are measured.
RULES = [
    "verify/oracle.py",
    "verify/oracle_wide.py",
    *(f"verify/fuzz/{name}.py" for name in ("specs", "draw", "verdicts")),
]


def blocks(cases: int) -> list[tuple[str, int]]:
    """Return (implementation, number) of every block. The implementations take turns, so that a
    campaign that is cut short only has fewer cases."""
    counts = {impl: math.ceil(cases * part / BLOCK[impl]) for impl, part in FRACTIONS.items()}
    return sorted(
        ((impl, i) for impl in FRACTIONS for i in range(counts[impl])),
        key=lambda entry: entry[1] / counts[entry[0]],
    )


def run_block(impl: str, number: int, seed: int, size: int) -> list[dict[str, Any]]:
    """Return `size` cases and their outcomes."""
    import hypothesis

    from verify.fuzz.draw import specs

    cases: list[dict[str, Any]] = []

    @hypothesis.seed(
        int.from_bytes(hashlib.sha256(f"{seed} {impl} {number}".encode()).digest()[:8], "big")
    )
    @hypothesis.settings(
        max_examples=size,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(specs(impl))
    def each(spec: Any) -> None:
        cases.append(run_case(spec))

    each()
    return cases


def run_case(spec: Any) -> dict[str, Any]:
    """Return a case as `fuzz_table.aggregate` takes it. An exception is a violation."""
    from verify.fuzz.verdicts import run

    try:
        outcomes: list[Sequence[Any]] = list(run(spec, current().torch_device))
    except Exception as error:
        outcomes = [
            (
                "call",
                "violation",
                math.nan,
                math.nan,
                math.nan,
                False,
                f"{type(error).__name__}: {error}",
            )
        ]
    return {
        "impl": spec.impl,
        "dtype": spec.product_dtype,
        "loss": spec.loss,
        "activation": spec.activation,
        "spec": changed(spec),
        "outcomes": [
            (name, verdict, *map(fuzz_table.plain, sizes), text)
            for name, verdict, *sizes, text in outcomes
        ],
    }


def changed(spec: Any) -> dict[str, Any]:
    """Return the fields that differ from the default, and always impl and seed."""
    default = dataclasses.asdict(type(spec)())
    return {
        k: v
        for k, v in dataclasses.asdict(spec).items()
        if k in ("impl", "seed") or v != default[k]
    }


def distinct(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every case once: all blocks begin with the same simple ones."""
    return list({json.dumps(case["spec"], sort_keys=True): case for case in cases}.values())


def _prepare() -> None:
    # A case is too small for several threads.
    torch.set_num_threads(1)
    # numpy warns of nan and infinity, which some cases contain on purpose.
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def _kept(seed: int) -> Path:
    """Return the file of blocks. Other code has another file, so that results of two versions do
    not mix."""
    digest = hashlib.sha256(record.stamp(current())["source"].encode())
    for path in (Path(__file__), *(ROOT / name for name in RULES)):
        digest.update(path.read_bytes())
    path = ROOT / "build" / "fuzz" / f"{seed}-{digest.hexdigest()[:12]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def campaign(wanted: Sequence[tuple[str, int]], seed: int, jobs: int, path: Path) -> None:
    """Run the blocks that `path` does not have yet."""
    done = {tuple(entry["block"]) for entry in record.load([path])} if path.exists() else set()
    left = [block for block in wanted if block not in done]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[found]} outside the rule"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, context, _prepare) as pool,
    ):
        bars = {
            impl: progress.add_task(
                impl, total=BLOCK[impl] * sum(i == impl for i, _ in left), found=0
            )
            for impl in FRACTIONS
        }
        failed = dict.fromkeys(FRACTIONS, 0)
        # ^C on a terminal reaches the workers too. They inherit that it is blocked.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        futures = {pool.submit(run_block, *block, seed, BLOCK[block[0]]): block for block in left}
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for future in as_completed(futures):
                block = futures[future]
                cases = future.result()
                record.append(path, {"block": block, "cases": cases})
                impl = block[0]
                failed[impl] += sum(
                    outcome[1] == "violation" for case in cases for outcome in case["outcomes"]
                )
                progress.update(bars[impl], advance=BLOCK[impl], found=failed[impl])
        except BaseException:
            # Without this the remaining blocks would run before the exception is raised.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv: Sequence[str] | None = None) -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("--cases", type=int, default=11_500, help="number of cases to draw (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the whole campaign (default: %(default)s)")
    add(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="number of processes (default: %(default)s)",
    )
    where.add_options(add)
    add("--case", type=json.loads, help="run only this case, given as JSON, and print its outcomes")
    options = parser.parse_args(argv)
    _prepare()
    if options.case is not None:
        from verify.fuzz.specs import Spec

        outcomes = run_case(Spec.of(options.case))["outcomes"]
        names = ("tensor", "verdict", "error", "eager's", "allowed", "turned", "message")
        print(markdown([names, *([str(cell) for cell in entry] for entry in outcomes)]))
        return int(any(verdict == "violation" for _, verdict, *_ in outcomes))

    wanted = blocks(options.cases)
    path = _kept(options.seed)
    written = where.file(options, "fuzz.jsonl", parser.error)
    stopped = 0
    try:
        campaign(wanted, options.seed, options.jobs, path)
    except KeyboardInterrupt as stop:
        stopped = screen.stopped(stop)
        print(f"stopped; the same command resumes from {path}", file=sys.stderr)
        if not path.exists():
            return stopped
    kept = [entry for entry in record.load([path]) if tuple(entry["block"]) in wanted]
    kept.sort(key=lambda entry: wanted.index(tuple(entry["block"])))
    cases = distinct([case for entry in kept for case in entry["cases"]])
    import hypothesis

    about = {
        "kind": "fuzz",
        "seed": options.seed,
        "drawn": options.cases,
        "hypothesis": hypothesis.__version__,
    }
    lines = [{**about, **line, **record.stamp(current())} for line in fuzz_table.aggregate(cases)]
    lines = [{**line, "date": lines[-1]["date"]} for line in lines]
    lost = ""
    for line in () if stopped else lines:
        # The table is shown even if the disk is full.
        try:
            record.append(written, line)
        except OSError as error:
            lost = screen.why(error, written)
    # A record has this digest once it is appended.
    digest = sources.digest("fuzz")
    print(fuzz_table.page([{**line, "measured": digest} for line in lines]))
    print(lost or ("Nothing is recorded of a part." if stopped else where.told(written)))
    failed = [entry for line in lines for entry in line["violations"]]
    if failed:
        print(
            markdown(
                plain_table([{**entry, "spec": json.dumps(entry["spec"])} for entry in failed])
            )
        )
    return stopped or int(bool(failed or lost))


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
