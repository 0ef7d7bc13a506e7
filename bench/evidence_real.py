"""What PRe does to the little LLaVA of real parts (`pre-kernels demo --real`), and which of its
options decide that: `python -m bench.evidence --real`.

Every arm of a seed starts from the same model after LLaVA's first stage, and sees the same batches.
bench/NOTES.md has the criterion by which an arm is chosen on the seeds of SEARCH; CONFIRM are the
seeds that were not looked at before.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pre_kernels import screen, sources
from pre_kernels.check.device import Cpu
from pre_kernels.demo.real.arm import Arm
from pre_kernels.demo.real.llms import LLMS
from pre_kernels.demo.real.pieces import Pieces, Unavailable, default_folder
from pre_kernels.demo.real.results import ARMS as TITLES
from pre_kernels.demo.real.results import Measure, Metrics, at, deep, right
from pre_kernels.demo.real.run import START, measure, prepare
from pre_kernels.demo.real.settings import Settings
from pre_kernels.diagnostics.report.statistics import interval, spread
from pre_kernels.fused.products import fastest_dtype

from . import record, where
from .stoppable import until_stopped
from .tables import below, claim, markdown

WITHOUT = "without PRe"
PAPER = "PRe"
CENTRED = {"anchor_norm": "center"}
LAYERS = LLMS[Settings.llm].layers
ARMS = {
    WITHOUT: Arm(None),
    PAPER: Arm(),
    "centred": Arm(CENTRED),
    "spatial": Arm({"anchor_norm": "spatial"}),
    "pre_projector": Arm({"anchor": "pre_projector"}),
    "pre_projector, λ 2": Arm({"anchor": "pre_projector", "weight": 2.0}),
    "pre_projector, λ 8": Arm({"anchor": "pre_projector", "weight": 8.0}),
    "λ 2": Arm({"weight": 2.0}),
    "λ 8": Arm({"weight": 8.0}),
    "centred, λ 2": Arm({"weight": 2.0, **CENTRED}),
    "centred, λ 8": Arm({"weight": 8.0, **CENTRED}),
    # This λ is too small to matter: its differences are the noise of training.
    "control, λ 0.0001": Arm({"weight": 1e-4}),
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
# The arm that was chosen on SEARCH for CONFIRM.
CHOSEN = "pre_projector, λ 8"
# The LLM of the search.
MAIN = Settings.llm
SEARCH = (0, 1)
CONFIRM = (10, 11, 12, 13, 14)


NAMES = {name: TITLES[name][0] for name in START}
OVER_DEPTH_HEADER = (
    "LLM",
    "training",
    "identity",
    "kind",
    "contrast ratio",
    "patches in five words",
    "the five words",
)
OVER_DEPTH = (
    "Layers 0 → L/2 → L of each LLM, for its first seed: what its patches hold, and the words to "
    "which the logit lens decodes them in the last layer."
)
# The least difference in right answers with which an arm counts as no worse.
LEAST_RIGHT = -0.02
# The metrics of the table.
METRICS: dict[str, Measure] = {
    "identity": partial(deep, key="identity"),
    "contrast ratio": partial(deep, key="contrast"),
    "right answers": right,
    "kind": partial(deep, key="probe"),
    "identity, layer L": partial(at, key="identity", layer=LAYERS),
    "cosine with layer 0": partial(deep, key="cosine"),
    "effective dimension": partial(deep, key="effective_dimension"),
    "patches in five words, layer L": partial(at, key="lens_share", layer=LAYERS),
}
GROUPS = {"Search": SEARCH, "Confirmation": CONFIRM}
PRECISIONS = {True: "bfloat16 (autocast)", False: "float32"}
Records = Sequence[Metrics]
Found = Mapping[tuple[str, int], Metrics]


def base(name: str) -> str:
    """Return the name of the training without PRe that an arm is compared with."""
    (same,) = [
        other
        for other, arm in ARMS.items()
        if arm == dataclasses.replace(ARMS[name], options=None, both=False)
    ]
    return same


def command(llm: str, arm: str, seed: int) -> str:
    """Return what measures this arm again."""
    said = ["python", "-m", "bench.evidence", "--real", "--seeds", str(seed)]
    said += ["--arms", WITHOUT if arm in START else arm]
    return shlex.join(said if llm == MAIN else [*said, "--llm", llm])


def table(records: Records) -> str:
    """Return the page's text: for each group of seeds and each arm, mean ± standard deviation over
    the seeds, and the difference to the same training without PRe within each seed."""
    own = [entry for entry in records if entry["settings"]["llm"] == MAIN]
    parts = []
    said = []
    # What was trained in different precisions is not compared.
    for bf16 in (True, False):
        found = {
            (entry["arm"], entry["seed"]): entry
            for entry in own
            if entry["settings"]["bf16"] == bf16
        }
        said += _claims(found)
        for group, members in GROUPS.items():
            rows: list[Sequence[str]] = [("", "seeds", *METRICS)]
            for arm in (*START, *ARMS):
                seeds = [seed for seed in members if (arm, seed) in found]
                if seeds:
                    cells = [_cell(found, arm, seeds, of) for of in METRICS.values()]
                    rows.append((NAMES.get(arm, arm), ", ".join(map(str, seeds)), *cells))
            if len(rows) > 1:
                parts += [f"{group}, in {PRECISIONS[bf16]}:", "", markdown(rows), ""]
    about = (
        "Identity and kind are accuracies of linear probes: which photograph is this thing, and "
        "of which kind, as stage two asks. They, contrast ratio, cosine and dimension are means "
        f"over the measured layers from {LAYERS // 2} to {LAYERS}. Mean ± standard deviation over "
        "the seeds of the row; brackets hold the difference to the same training without PRe, "
        "taken within each seed, and the number of seeds in which it is positive."
    )
    wide = [markdown(_over_depth(records)), "", OVER_DEPTH, ""]
    sentences = [*said, ""] if said else []
    return "\n".join([*parts, about, "", *sentences, *wide, below(records)])


def _over_depth(records: Records) -> list[Sequence[str]]:
    """Return the rows of a table of each LLM before, between and after the stages, for its first
    seed."""
    rows: list[Sequence[str]] = [OVER_DEPTH_HEADER]
    for llm, piece in LLMS.items():
        own = [entry for entry in records if entry["settings"]["llm"] == llm]
        lowest = min((entry["seed"] for entry in own), default=0)
        first = [entry for entry in own if entry["seed"] == lowest]
        layers = (0, piece.layers // 2, piece.layers)
        for arm in (*START, WITHOUT, PAPER):
            for entry in first:
                if entry["arm"] == arm:
                    courses = [
                        " → ".join(f"{at(entry, key, n):.{digits}f}" for n in layers)
                        for key, digits in (
                            ("identity", 3),
                            ("probe", 3),
                            ("contrast", 2),
                            ("lens_share", 2),
                        )
                    ]
                    said = ", ".join(f"`{word!r}`" for word in entry["words"][-1])
                    rows.append((piece.name, NAMES.get(arm, arm), *courses, said))
    return rows


def _cell(found: Found, arm: str, seeds: Sequence[int], of: Measure) -> str:
    text = spread([of(found[arm, seed]) for seed in seeds])
    if arm in START or base(arm) == arm:
        return text
    changes = [
        of(found[arm, seed]) - of(found[base(arm), seed])
        for seed in seeds
        if (base(arm), seed) in found
    ]
    above = sum(change > 0 for change in changes)
    return f"{text} ({spread(changes, '+')}; {above}/{len(changes)})" if changes else text


def _claims(found: Found) -> list[str]:
    """Return a sentence for each arm and measure of the whole confirmation, with its interval."""
    said = []
    for arm in ARMS:
        both = [found.get((name, seed)) for name in (arm, base(arm)) for seed in CONFIRM]
        if base(arm) == arm or None in both:
            continue
        for name, of in list(METRICS.items())[:4]:
            changes = [of(found[arm, seed]) - of(found[base(arm), seed]) for seed in CONFIRM]
            said.append(f"- {claim(f'{arm} raises the {name}', changes)}")
            if of is right:
                low, _ = interval(changes)
                kept = "shown" if low >= LEAST_RIGHT else "not shown, within the noise"
                said.append(f"- {arm} lowers the {name} by no more than {-LEAST_RIGHT}: {kept}.")
    return said


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
    add("--llm", choices=LLMS, default=MAIN, help="the text LLM (default: %(default)s)")
    add("--arms", nargs="+", metavar="ARM", help="(default: all; of another LLM the first two)")
    add("--work", type=Path, default=where.UNTRACKED / "real", help="folder of unfinished arms")
    where.add_options(add)
    options = parser.parse_args(argv)
    options.arms = options.arms or (list(ARMS) if options.llm == MAIN else [WITHOUT, PAPER])
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        parser.error(f"--arms: got {', '.join(unknown)}, want some of: {'; '.join(ARMS)}")
    bf16 = fastest_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    settings = Settings(llm=options.llm, bf16=bf16)
    deepest = LLMS[options.llm].layers
    if too_deep := [
        arm for arm in options.arms if (ARMS[arm].options or {}).get("layer", 0) > deepest
    ]:
        parser.error(
            f"--arms: {', '.join(too_deep)} needs {LAYERS} layers, {options.llm} has {deepest}"
        )
    path = where.file(options, "evidence_real.jsonl", parser.error)
    done = {
        (entry["arm"], entry["seed"])
        for entry in record.load([path])
        if entry["settings"] == dataclasses.asdict(settings)
        and entry["measured"] == sources.digest("real")
    }
    every = [(arm, seed) for seed in options.seeds for arm in (*START, *options.arms)]
    wanted = [job for job in every if job not in done]
    pieces = Pieces(options.parts)
    try:
        prepare(settings, pieces, Console())
    except ValueError as error:
        parser.error(str(error))

    def keep(arm: str, seed: int, metrics: dict[str, Any], seconds: float) -> None:
        options = dataclasses.asdict(ARMS[arm]) if arm in ARMS else None
        line: dict[str, Any] = {"kind": "real", "item": f"{settings.llm}, {arm}, seed {seed}"}
        line |= {"arm": arm, "seed": seed, "command": command(settings.llm, arm, seed)}
        line |= {"options": options, **metrics, "settings": dataclasses.asdict(settings)}
        record.append(path, line | {"seconds": seconds} | record.stamp(Cpu()))

    try:
        stopped = until_stopped(
            lambda bar: measure(
                ARMS, wanted, settings, pieces, "cpu", options.work, keep, bar, options.jobs
            )
        )
    except Unavailable as error:
        parser.error(str(error))
    print(where.told(path))
    return stopped


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
