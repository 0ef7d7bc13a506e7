"""What PRe does to the little LLaVA of real parts (`pre-kernels demo --real`), and which of its
options decide that: `python -m bench.evidence --real`.

Every arm of a seed starts from the same model after LLaVA's first stage, and sees the same batches.
bench/NOTES.md has the criterion by which an arm is chosen on the seeds of SEARCH; CONFIRM are the
seeds that were not looked at before.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pre_kernels import screen
from pre_kernels.check.device import Cpu
from pre_kernels.demo.progress import bars
from pre_kernels.demo.real.arm import Arm
from pre_kernels.demo.real.pieces import LLMS, Pieces, Unavailable, default_folder
from pre_kernels.demo.real.run import START, measure
from pre_kernels.demo.real.settings import Settings
from pre_kernels.demo.threads import quiet

from . import record, where

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


def main(argv: Sequence[str] | None = None) -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=list(SEARCH), help="(default: 0 1)")
    add("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    add(
        "--parts",
        type=Path,
        default=default_folder(),
        help="folder of the real parts (default: %(default)s)",
    )
    add("--arms", nargs="+", default=list(ARMS), metavar="ARM", help="(default: all)")
    add("--work", type=Path, default=where.UNTRACKED / "real", help="folder of unfinished arms")
    where.add_options(add)
    options = parser.parse_args(argv)
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        parser.error(f"--arms: got {', '.join(unknown)}, want some of: {'; '.join(ARMS)}")
    settings = Settings()
    pieces = Pieces(options.parts)
    try:
        pieces.check(LLMS[settings.llm])
    except Unavailable as error:
        parser.error(str(error))
    path = where.file(options, "evidence_real.jsonl", parser.error)
    done = {(entry["arm"], entry["seed"]) for entry in record.load([path])}
    every = [(arm, seed) for arm in (*START, *options.arms) for seed in options.seeds]
    wanted = [job for job in every if job not in done]

    def keep(arm: str, seed: int, metrics: dict[str, Any], seconds: float) -> None:
        options = dataclasses.asdict(ARMS[arm]) if arm in ARMS else None
        line = {"kind": "real", "item": f"{arm}, seed {seed}", "arm": arm, "seed": seed}
        line |= {"options": options, **metrics, "settings": dataclasses.asdict(settings)}
        record.append(path, line | {"seconds": seconds} | record.stamp(Cpu()))

    stopped = 0
    restore = quiet()
    try:
        with bars(Console()) as bar:
            measure(ARMS, wanted, settings, pieces, "cpu", options.work, keep, bar, options.jobs)
    except KeyboardInterrupt as stop:
        stopped = screen.stopped(stop)
    finally:
        restore()
    if stopped:
        print("Stopped: the same command resumes.")
    print(where.told(path))
    return stopped


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
