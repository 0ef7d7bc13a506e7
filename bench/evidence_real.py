"""What PRe does to the little LLaVA of real parts (`pre-kernels demo --real`), and which of its
options decide that: `python -m bench.evidence --real`.

Every arm of a seed starts from the same model after LLaVA's first stage, and sees the same batches.
bench/NOTES.md has the criterion by which an arm is chosen on the seeds of SEARCH; CONFIRM are the
seeds that were not looked at before.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pre_kernels import screen
from pre_kernels.check.device import Cpu
from pre_kernels.demo.progress import bars
from pre_kernels.demo.real.arm import Arm, Seed
from pre_kernels.demo.real.pieces import Pieces
from pre_kernels.demo.real.settings import Settings
from pre_kernels.demo.stages import Bar
from pre_kernels.demo.threads import quiet
from pre_kernels.demo.workers import each_seed

from . import record, where

BEFORE = "before visual training"
ALIGNED = "after stage one"
WITHOUT = "without PRe"
PAPER = "PRe"
CENTRED = {"anchor_norm": "center"}
LAYERS = 30
ARMS = {
    WITHOUT: Arm(None),
    PAPER: Arm(),
    "centred": Arm(CENTRED),
    "spatial": Arm({"anchor_norm": "spatial"}),
    "pre_projector": Arm({"anchor": "pre_projector"}),
    "λ 2": Arm({"weight": 2.0}),
    "centred, λ 2": Arm({"weight": 2.0, **CENTRED}),
    "mse": Arm({"loss": "mse"}),
    "layer L": Arm({"layer": LAYERS}),
    "centred, layer L": Arm({"layer": LAYERS, **CENTRED}),
    "centred, both stages": Arm(CENTRED, both=True),
    "centred, wide head": Arm({"hidden_dim": 2304, **CENTRED}),
    "LoRA, without PRe": Arm(None, trained="lora"),
    "LoRA, centred": Arm(CENTRED, trained="lora"),
    "frozen, without PRe": Arm(None, trained="frozen"),
    "frozen, centred": Arm(CENTRED, trained="frozen"),
    "rate × 3, without PRe": Arm(None, rate=3e-4),
    "rate × 3, centred": Arm(CENTRED, rate=3e-4),
    "steps × 2, without PRe": Arm(None, longer=2),
    "steps × 2, centred": Arm(CENTRED, longer=2),
}
SEARCH = (0, 1)
CONFIRM = (10, 11, 12, 13, 14)
# The last seed that this process ran.
_SEEDS: dict[int, Seed] = {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("--parts", type=Path, required=True, help="folder of the real parts")
    add("--seeds", type=int, nargs="+", default=list(SEARCH), help="(default: 0 1)")
    add("--arms", nargs="+", default=list(ARMS), metavar="ARM", help="(default: all)")
    add("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    add("--work", type=Path, default=where.UNTRACKED / "real", help="folder of unfinished arms")
    where.add_options(add)
    options = parser.parse_args(argv)
    unknown = [arm for arm in options.arms if arm not in ARMS]
    if unknown:
        parser.error(f"--arms: got {', '.join(unknown)}, want some of: {'; '.join(ARMS)}")
    path = where.file(options, "evidence_real.jsonl", parser.error)
    return run(options, path)


def run(options: argparse.Namespace, path: Path) -> int:
    settings = Settings()
    pieces = Pieces(options.parts)
    stopped = 0
    restore = quiet()
    try:
        with bars(Console()) as bar:
            for arms in ([BEFORE, ALIGNED], options.arms):
                done = {(entry["arm"], entry["seed"]) for entry in record.load([path])}
                wanted = [(arm, seed) for arm in arms for seed in options.seeds]
                left = [job for job in wanted if job not in done]
                if arms[0] == BEFORE:
                    # Both are of the model that all arms of the seed start from.
                    left = sorted({(ALIGNED, seed) for _, seed in left})
                jobs = min(options.jobs, max(len(left), 1))
                shared = (left, settings, pieces, options.work, path)
                each_seed(run_job, len(left), shared, bar, jobs)
    except KeyboardInterrupt as stop:
        stopped = screen.stopped(stop)
    finally:
        restore()
    if stopped:
        print("Stopped: the same command resumes.")
    print(where.told(path))
    return stopped


def run_job(
    number: int,
    jobs: Sequence[tuple[str, int]],
    settings: Settings,
    pieces: Pieces,
    work: Path,
    path: Path,
    bar: Bar,
) -> None:
    """Measure an arm of a seed, and append it to `path`."""
    name, number = jobs[number]
    begin = time.monotonic()
    if number not in _SEEDS:
        # The models of further seeds would fill the memory.
        _SEEDS.clear()
        _SEEDS[number] = Seed(number, settings, pieces, "cpu", work, bar)
    seed = _SEEDS[number]
    seed.bar = bar

    def keep(arm: str, measured: dict[str, Any]) -> None:
        line = {"kind": "real", "item": f"{arm}, seed {number}", "arm": arm, "seed": number}
        line |= {"options": None, **measured, "settings": dataclasses.asdict(settings)}
        if arm in ARMS:
            line["options"] = dataclasses.asdict(ARMS[arm])
        line["seconds"] = round(time.monotonic() - begin, 1)
        record.append(path, line | record.stamp(Cpu()))

    if name == ALIGNED:
        keep(BEFORE, seed.before())
        keep(ALIGNED, seed.aligned()[1])
    else:
        keep(name, seed.run(name, ARMS[name]))


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
