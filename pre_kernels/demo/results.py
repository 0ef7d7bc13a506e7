"""The results of a comparison as tables, a plot and a report. Every number in them comes from the
runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pre_kernels.diagnostics.report import page
from pre_kernels.diagnostics.report.plots import COLOURS, DASHES
from pre_kernels.diagnostics.report.statistics import effect, spread
from pre_kernels.screen import plural, why, write

from . import words
from .picture import scene
from .scenes import OBJECTS

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
SHORT_HEADER = ("↑ ↓: better if higher, lower", "without PRe", "with PRe", "better with PRe")
MARKS = {1: "↑", -1: "↓"}
TITLE = "A tiny LLaVA on scenes of handwritten digits"
SMOKE_TITLE = "Smoke test, too short to show an effect"
Values = list[float] | None
Rows = list[tuple[str, Values, Values]]


def short_rows(results: dict[str, Any], spreads: bool = True) -> list[tuple[str, ...]]:
    """Return the rows of the short table: the metric, its mean without and with PRe, and in how
    many seeds it is better with PRe. A smoke test says nothing about better.

    Args:
        results: what `parts.compare` returns.
        spreads: whether the standard deviation over seeds is shown too.
    """
    settings = results["settings"]
    layers = {0: "input", settings["layer"]: f"layer {settings['layer']}"}
    layers[settings["layers"]] = "last layer"
    metrics: list[tuple[str, str, int | None, int]] = [
        ("task accuracy", "accuracy", None, 1),
        ("L_PRe", "pre_loss", None, -1),
    ]
    metrics += [(f"linear probe, {where}", "probe", layer, 1) for layer, where in layers.items()]
    # The screen has 24 lines.
    for layer in (0, settings["layers"]):
        metrics.append((f"contrast ratio, {layers[layer]}", "contrast", layer, 1))
    rows = []
    for name, key, index, sign in metrics:
        without, with_ = (_values(results, arm, key, index) or [] for arm in ("without", "with"))
        shown = [spread(v if spreads else [mean(v)]) for v in (without, with_)]
        last = words.better([b - a for a, b in zip(without, with_, strict=True)], sign)
        smoke = words.smoke_test(settings)
        rows.append((f"{name} {MARKS[sign]}", *shown, *(() if smoke else (last,))))
    return rows


def _values(results: dict[str, Any], arm: str, key: str, index: int | None = None) -> Values:
    runs = [seed[arm] for seed in results["seeds"]]
    if key not in runs[0]:
        return None
    return [run[key] if index is None else run[key][index] for run in runs]


def table_rows(results: dict[str, Any]) -> Rows:
    """Return the rows of the table: the name, and a value per seed without and with PRe."""
    depth = results["settings"]["layers"]

    def row(name: str, key: str, index: int | None = None) -> tuple[str, Values, Values]:
        without = _values(results, "without", key, index)
        return name, without, _values(results, "with", key, index)

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
    name = settings.get("head", "pre")
    head = "" if name == "pre" else f", with the head of {name}"
    return (
        f"PRe has λ = {settings['weight']:g} at layer {settings['layer']} of "
        f"{settings['layers']}{head}. Values are mean ± standard deviation over seeds {numbers}. "
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
        tested = {"probe_test": settings["test_scenes"] * OBJECTS, "probe_chance": 0.1}
        return [
            {"layer": n} | {metric: lists[name][n] for name, metric in names.items()} | tested
            for n in layers
        ]

    smoke = words.smoke_test(settings)
    return {
        "title": f"{TITLE}, without and with PRe",
        "verdict": words.verdict(results),
        "about": words.ABOUT,
        "warning": words.SMOKE if smoke else None,
        "scene": scene(),
        "unit": "digits",
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
        "findings": [] if smoke else training(results),
        "notes": [
            caption(results),
            "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        ],
        "data": {"images": settings["test_scenes"], "masks": "the patches of each digit"},
    } | {name: results[name] for name in ("device", "versions", "date")}


def markdown(results: dict[str, Any]) -> str:
    """Return all numbers and what follows from them, as Markdown without HTML."""
    lines = markdown_table(HEADER, cells(results))
    lines += ["", caption(results), "", *(f"- {sentence}" for sentence in conclusion(results)), ""]
    return "\n".join(lines)


def story(results: dict[str, Any]) -> str:
    """Return the verdict, what PRe is, the short table and the picture as Markdown, with all
    numbers folded."""
    smoke = words.smoke_test(results["settings"])
    short = markdown_table(SHORT_HEADER[: 3 if smoke else 4], short_rows(results))
    lines = [
        f"# {SMOKE_TITLE if smoke else TITLE}",
        "",
        *([f"**{words.SMOKE}**"] if smoke else [f"- {text}" for text in words.verdict(results)]),
        "",
        words.ABOUT,
        "",
        *short,
        "",
        took(results),
        "",
        "![Linear probe, contrast ratio and L_PRe, without and with PRe](demo.png)",
        "",
        "<details>",
        "<summary>All numbers</summary>",
        "",
        markdown(results),
        "</details>",
        "",
    ]
    return "\n".join(lines)


def took(results: dict[str, Any]) -> str:
    """Return how long the run took, and on which machine."""
    return f"Measured in {minutes(results['seconds'])} on {results['device']}."


def minutes(seconds: float) -> str:
    """Return a time in whole minutes, or in seconds below one."""
    return f"{seconds:.0f} s" if seconds < 60 else plural(round(seconds / 60), "minute")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def save(results: dict[str, Any], folder: Path) -> tuple[list[Path], list[str]]:
    """Write demo.json, demo.md, demo.png and demo.html, and return the paths of those that were
    written, and why the others were not."""
    from .plot import draw

    shown = document(results)

    def picture(path: Path) -> None:
        draw(shown, path, words.SMOKE if shown["warning"] else "")

    def text(content: Callable[[], str]) -> Callable[[Path], object]:
        return lambda path: write(path, content())

    files: dict[str, Callable[[Path], object]] = {
        "json": text(lambda: json.dumps(results, indent=1) + "\n"),
        "md": text(lambda: story(results)),
        "png": picture,
        "html": text(lambda: page.html(shown)),
    }
    written = []
    problems = []
    for ending, make in files.items():
        path = folder / f"demo.{ending}"
        try:
            make(path)
            written.append(path)
        except OSError as error:
            problems.append(why(error, path))
    return written, problems
