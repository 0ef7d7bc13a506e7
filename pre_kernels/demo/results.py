"""The results of a comparison as a table, a plot, sentences and a report. Every number in them
comes from the runs."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from pre_kernels.diagnostics.report import page
from pre_kernels.diagnostics.report.plots import COLOURS, DASHES
from pre_kernels.diagnostics.report.statistics import effect, spread

# Each arm has a name and a style of line.
ARMS = {
    "before": ("before visual training", {"color": "0.55", "linestyle": ":"}),
    "without": ("without PRe", {"color": COLOURS[0], "linestyle": "-"}),
    "with": ("with PRe", {"color": COLOURS[1], "linestyle": "-"}),
}
# The keys are the names of the lists over layers, the values the metrics of a report.
METRICS = {"probe": "linear_probe"} | {
    name: name
    for name in ("contrast", "cohesion", "coupling", "cosine", "effective_dimension", "correlation")
}
HEADER = ("", "without PRe", "with PRe", "difference")
Rows = list[tuple[str, list[float] | None, list[float] | None]]


def table_rows(results: dict[str, Any]) -> Rows:
    """Return the rows of the table: the name, and a value per seed without and with PRe."""
    depth = results["settings"]["layers"]

    def row(
        name: str, key: str, index: int | None = None
    ) -> tuple[str, list[float] | None, list[float] | None]:
        values = [
            [arm[key] if index is None else arm[key][index] for arm in runs]
            if key in runs[0]
            else None
            for runs in (
                [seed["without"] for seed in results["seeds"]],
                [seed["with"] for seed in results["seeds"]],
            )
        ]
        return name, values[0], values[1]

    rows = [
        row("task accuracy", "accuracy"),
        row("L_PRe, fitted predictor", "pre_loss"),
        row("L_PRe, own predictor", "pre_loss_own"),
        row("L_PRe, constant", "pre_loss_constant"),
    ]
    rows += [row(f"linear probe, layer {n}", "probe", n) for n in range(depth + 1)]
    rows += [row(f"contrast ratio, layer {n}", "contrast", n) for n in range(depth + 1)]
    return rows


def difference(without: list[float] | None, with_: list[float] | None) -> list[float] | None:
    """Return with minus without, seed by seed."""
    if without is None or with_ is None:
        return None
    return [b - a for a, b in zip(without, with_, strict=True)]


def cells(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (name, spread(a), spread(b), spread(difference(a, b), "+"))
        for name, a, b in table_rows(results)
    ]


def caption(results: dict[str, Any]) -> str:
    """Explain the columns and rows of the table."""
    settings = results["settings"]
    numbers = ", ".join(str(seed["seed"]) for seed in results["seeds"])
    return (
        f"PRe has λ = {settings['weight']:g} at layer {settings['layer']} of "
        f"{settings['layers']}. Values are mean ± standard deviation over seeds {numbers}. "
        "Differences are taken within each seed, whose two runs share the pre-trained parts, the "
        "data and its order. All values come from scenes of digits that no training saw. L_PRe is "
        "given for three predictors: one that is fitted after training on the frozen states of "
        "further scenes, in the same way for both columns; the one that was trained with the "
        "model; and a constant, the mean direction of the embeddings. The linear probe, which is "
        "also fitted after training, names each digit from the mean of its patches (chance 0.1). "
        "Layer 0 is the input of the LLM. The semantic contrast ratio is the mean cosine "
        "similarity of patches of one digit divided by that of patches of different digits."
    )


def conclusion(results: dict[str, Any]) -> list[str]:
    """Say in words which differences follow from the numbers."""
    settings = results["settings"]
    layer, depth = settings["layer"], settings["layers"]
    runs = results["seeds"]

    def deep(arm: str, key: str) -> list[float]:
        return [mean(run[arm][key][layer:]) for run in runs]

    fall = [
        mean(run[arm]["probe"][0] for run in runs) - mean(run[arm]["probe"][depth] for run in runs)
        for arm in ("before", "without", "with")
    ]
    return [
        f"From layer 0 to {depth} the probe loses {fall[0]:.3f} before visual training, "
        f"{fall[1]:.3f} after training without PRe and {fall[2]:.3f} with it.",
        *training(results),
        effect(
            f"Linear probe, mean of layers {layer} to {depth}",
            deep("without", "probe"),
            deep("with", "probe"),
        ),
        effect(
            f"Semantic contrast ratio, mean of layers {layer} to {depth}",
            deep("without", "contrast"),
            deep("with", "contrast"),
        ),
        *(["One seed says nothing about noise: use --seeds."] if len(runs) < 2 else []),
    ]


def training(results: dict[str, Any]) -> list[str]:
    """Return the conclusions that are not about depth."""
    runs = results["seeds"]
    curves = [run["with"]["train_pre_loss"] for run in runs]
    first, last = (mean(mean(c[part]) for c in curves) for part in (slice(0, 5), slice(-5, None)))
    verb = "fell" if last < first else "did not fall"
    return [
        f"L_PRe {verb} in training with PRe: {first:.3f} over the first 5 steps, {last:.3f} over "
        "the last 5.",
        effect(
            "Task accuracy",
            [r["without"]["accuracy"] for r in runs],
            [r["with"]["accuracy"] for r in runs],
        ),
    ]


def document(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results as a document for `diagnostics.report.page.html`, with each seed as a
    run."""
    settings = results["settings"]
    seeds = results["seeds"]
    layers = range(settings["layers"] + 1)

    def rows(lists: dict[str, Any]) -> list[dict[str, Any]]:
        names = {name: metric for name, metric in METRICS.items() if name in lists}
        return [
            {"layer": n} | {metric: lists[name][n] for name, metric in names.items()}
            for n in layers
        ]

    return {
        "title": "A tiny LLaVA on scenes of handwritten digits, without and with PRe",
        "models": [
            {
                "name": name,
                "style": style,
                "depth": settings["layers"],
                "runs": [rows(seed[arm]) for seed in seeds],
            }
            for arm, (name, style) in ARMS.items()
        ],
        "marked": [settings["layer"]],
        "curves": [
            {
                "name": f"with PRe, seed {seed['seed']}",
                "label": f"L_PRe at layer {settings['layer']} (line: stage two begins)",
                "values": seed["with"]["train_pre_loss"],
                "marked": [settings["align_steps"]],
                "style": {"color": COLOURS[1], "linestyle": DASHES[n % len(DASHES)]},
            }
            for n, seed in enumerate(seeds)
        ],
        "findings": training(results),
        "notes": [
            caption(results),
            "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        ],
        "data": {"images": settings["test_scenes"], "masks": "the patches of each digit"},
    } | {name: results[name] for name in ("device", "versions", "date")}


def markdown(results: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in cells(results)]
    lines += ["", caption(results), "", *(f"- {sentence}" for sentence in conclusion(results)), ""]
    return "\n".join(lines)


def save(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write demo.json, demo.md, demo.png and demo.html, and return their paths."""
    from .plot import draw

    paths = [folder / f"demo.{ending}" for ending in ("json", "md", "png", "html")]
    shown = document(results)
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(results), encoding="utf-8")
    draw(shown, paths[2])
    paths[3].write_text(page.html(shown), encoding="utf-8")
    return paths
