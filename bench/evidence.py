"""What PRe does to the demo's tiny LLaVA, over seeds and the paper's ablations.

    python -m bench.evidence                    5 seeds, a process for each core; trainings whose
                                                results are there are not run again
    python -m bench.evidence --real             the same on real parts, see bench/evidence_real.py
    python -m bench.report --pages evidence     no training: the table of the committed results in
                                                docs/evidence.md

Every seed pre-trains one model. Every arm starts from it, on the same batches in the same order.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pre_kernels import screen
from pre_kernels.check.device import Cpu
from pre_kernels.demo.compare import pretrained, run_arm, split
from pre_kernels.demo.evaluate import evaluate
from pre_kernels.demo.settings import QUICK, Settings
from pre_kernels.demo.stages import Bar
from pre_kernels.demo.workers import each_seed
from pre_kernels.diagnostics.report.statistics import spread

from . import record, where
from .stoppable import until_stopped
from .tables import below, claim, markdown

DEPTH = Settings().layers
BASE = "cosine, L/2"
BEFORE = "before visual training"
WITHOUT = "without PRe"
# options of apply_pre; None: a training without PRe
ARMS: dict[str, dict[str, Any] | None] = {
    WITHOUT: None,
    BASE: {},
    "mse": {"loss": "mse"},
    "L/4": {"layer": DEPTH // 4},
    "3L/4": {"layer": 3 * DEPTH // 4},
    "L": {"layer": DEPTH},
    "anchor pre_projector": {"anchor": "pre_projector"},
    "image level": {"level": "image"},
}
DEEP = slice(DEPTH // 2, None)  # layers L/2 to L
METRICS = {
    "task accuracy": lambda entry: entry["accuracy"],
    "linear probe, mean of L/2 to L": lambda entry: mean(entry["probe"][DEEP]),
    "linear probe, layer L": lambda entry: entry["probe"][-1],
    "contrast ratio, mean of L/2 to L": lambda entry: mean(entry["contrast"][DEEP]),
    "cosine with layer 0, mean of L/2 to L": lambda entry: mean(entry["cosine"][DEEP]),
    "effective dimension, mean of L/2 to L": lambda entry: mean(entry["effective_dimension"][DEEP]),
    "feature correlation, mean of L/2 to L": lambda entry: mean(entry["correlation"][DEEP]),
}


def _gain(name: str, arm: str = BASE, over: str = WITHOUT) -> Callable[[Mapping[str, Any]], float]:
    metric = METRICS[name]
    return lambda arms: metric(arms[arm]) - metric(arms[over])


PROBE = "linear probe, mean of L/2 to L"
CONTRAST = "contrast ratio, mean of L/2 to L"
# Each finding, and the difference that it says is positive.
CLAIMS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "An LLM that has only seen text loses what patches show (probe, layer 0 minus layer L)": (
        lambda arms: arms[BEFORE]["probe"][0] - arms[BEFORE]["probe"][-1]
    ),
    "Training without PRe repairs it only in part (the same difference)": (
        lambda arms: arms[WITHOUT]["probe"][0] - arms[WITHOUT]["probe"][-1]
    ),
    "Training without PRe loses patch structure (contrast ratio, layer 0 minus mean of L/2 to L)": (
        lambda arms: arms[WITHOUT]["contrast"][0] - METRICS[CONTRAST](arms[WITHOUT])
    ),
    f"PRe raises the {PROBE}": _gain(PROBE),
    f"PRe raises the {CONTRAST}": _gain(CONTRAST),
    "PRe raises the effective dimension": _gain("effective dimension, mean of L/2 to L"),
    "PRe raises task accuracy": _gain("task accuracy"),
    "Cosine has a higher probe than MSE": _gain(PROBE, BASE, "mse"),
    "Layer L/2 has a higher probe than layer L": _gain(PROBE, BASE, "L"),
    "Layer L/2 has a higher task accuracy than layer L": _gain("task accuracy", BASE, "L"),
    "The embeddings as anchor have a higher probe than the projector's input": (
        _gain(PROBE, BASE, "anchor pre_projector")
    ),
    "A term for each patch has a higher probe than one for each image": _gain(
        PROBE, BASE, "image level"
    ),
}


def run_seed(
    seed: int, settings: Settings, path: Path, done: set[tuple[int, str]], bar: Bar
) -> None:
    """Measure every arm of a seed that is not in `done`, and append each to `path` as soon as it is
    measured."""
    if {(seed, arm) for arm in (BEFORE, *ARMS)} <= done:
        return
    scenes = split(seed, settings)
    start = pretrained(scenes[0], settings, seed, "cpu", bar)

    def keep(arm: str, measured: dict[str, Any], seconds: float) -> None:
        curves = ("train_loss", "train_pre_loss")
        measured = {name: value for name, value in measured.items() if name not in curves}
        line = {
            "kind": "evidence",
            "item": f"{arm}, seed {seed}",
            "arm": arm,
            "seed": seed,
            **measured,
        }
        line |= {"seconds": round(seconds, 1), "settings": dataclasses.asdict(settings)}
        record.append(path, line | record.stamp(Cpu()))

    if (seed, BEFORE) not in done:
        keep(BEFORE, evaluate(start, *scenes[1:], settings, None), 0.0)
    for arm, options in ARMS.items():
        if (seed, arm) in done:
            continue
        begin = time.monotonic()
        measured = run_arm(arm, options, copy.deepcopy(start), scenes, settings, seed, bar)
        keep(arm, measured, time.monotonic() - begin)


def whole_seeds(records: Sequence[dict[str, Any]]) -> list[int]:
    """Return the seeds of which every arm is measured."""
    return sorted(
        set.intersection(
            *(
                {entry["seed"] for entry in records if entry["arm"] == arm}
                for arm in (BEFORE, *ARMS)
            )
        )
    )


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the page's text: mean ± standard deviation over seeds, and the difference to training
    without PRe within each seed."""
    seeds = whole_seeds(records)
    by_arm = {
        arm: [
            next(entry for entry in records if (entry["arm"], entry["seed"]) == (arm, seed))
            for seed in seeds
        ]
        for arm in (BEFORE, *ARMS)
    }
    rows: list[Sequence[str]] = [("", *METRICS)]
    for arm, runs in by_arm.items():
        cells = []
        for metric in METRICS.values():
            values = [metric(entry) for entry in runs]
            base = [metric(entry) for entry in by_arm[WITHOUT]]
            changes = [value - other for value, other in zip(values, base, strict=True)]
            above = f"{sum(change > 0 for change in changes)}/{len(changes)}"
            added = "" if arm in (BEFORE, WITHOUT) else f" ({spread(changes, '+')}; {above})"
            cells.append(spread(values) + added)
        rows.append((arm, *cells))
    sentences = [
        claim(
            text,
            [difference({a: runs[i] for a, runs in by_arm.items()}) for i in range(len(seeds))],
        )
        for text, difference in CLAIMS.items()
    ]
    about = (
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}. Brackets hold the "
        "difference to training without PRe, taken within each seed, and the number of seeds in "
        "which it is positive."
    )
    shown = [entry for entry in records if entry["seed"] in seeds]
    findings = [
        "The paper's findings and choices in these seeds, each as a difference within a seed:",
        "",
        *(f"- {s}" for s in sentences),
    ]
    return "\n".join([markdown(rows), "", about, "", *findings, "", below(shown)])


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--real" in argv:
        from . import evidence_real

        return evidence_real.main([option for option in argv if option != "--real"])
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("--real", action="store_true", help="real parts; `--real --help` lists its options")
    add("--seeds", type=int, default=5, help="use seeds 0 .. N-1 (default: %(default)s)")
    add(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="number of processes (default: %(default)s)",
    )
    add("--quick", action="store_true", help="smoke test: too short to show an effect")
    where.add_options(add)
    options = parser.parse_args(argv)
    path = where.file(options, "evidence.jsonl", parser.error)
    records = record.load([path])
    settings = dataclasses.replace(QUICK if options.quick else Settings(), seeds=options.seeds)
    others = {
        entry["item"]
        for entry in records
        if {**entry["settings"], "seeds": options.seeds} != vars(settings)
    }
    if others:
        parser.error(f"--results: {path} has results of other settings; want another folder")
    done = {(entry["seed"], entry["arm"]) for entry in records}
    jobs = min(options.jobs, options.seeds)
    stopped = until_stopped(
        lambda bar: each_seed(run_seed, options.seeds, (settings, path, done), bar, jobs)
    )
    records = record.load([path])
    if whole_seeds(records):
        print(table(records))
    print(where.told(path))
    return stopped


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
