"""The results of the real comparison in words, as tables, plots and a report. Every number in them
comes from the runs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from pre_kernels.demo import words
from pre_kernels.demo.plot import draw
from pre_kernels.demo.results import METRICS, markdown_table, took
from pre_kernels.diagnostics.report import page
from pre_kernels.diagnostics.report.plots import COLOURS, DASHES
from pre_kernels.diagnostics.report.statistics import effect, spread
from pre_kernels.diagnostics.run import trace
from pre_kernels.screen import why, write

from .photographs import CATEGORIES
from .scenes import PLACES
from .settings import Settings

TITLE = "A little LLaVA of real parts, on photographs"
ARMS = {
    "before": ("before visual training", {"color": "0.55", "linestyle": ":"}),
    "aligned": ("after stage one", {"color": "0.55", "linestyle": "--"}),
    "without": ("without PRe", {"color": COLOURS[0], "linestyle": "-"}),
    "with": ("with PRe", {"color": COLOURS[1], "linestyle": "-"}),
}
CHANCE = 1 / len(CATEGORIES)
# The traces along the second stage: the metric of `pre-kernels trace`, and the file.
TRACES = {"identity": "trace-probe.png", "contrast": "trace-contrast.png"}
RECOGNISED = ("Linear probe: which photograph?", "accuracy in other scenes")
Results = dict[str, Any]
Metrics = dict[str, Any]
Measure = Callable[[Metrics], float]


def smoke_test(results: Results) -> bool:
    """Return whether the trainings were shorter than the demo's own."""
    return bool(results["settings"]["tune_steps"] < Settings.tune_steps)


def deep(metrics: Metrics, key: str) -> float:
    """Return the mean of a metric over the measured layers from L/2 to L."""
    layers: list[int] = metrics["layers"]
    first = next(n for n, layer in enumerate(layers) if layer >= layers[-1] // 2)
    value: float = mean(metrics[key][first:])
    return value


def at(metrics: Metrics, key: str, layer: int) -> float:
    """Return a metric of a layer."""
    value: float = metrics[key][metrics["layers"].index(layer)]
    return value


def right(metrics: Metrics) -> float:
    """Return the share of right answers."""
    share: float = metrics["accuracy"]
    return share


def verdict(results: Results) -> list[str]:
    """Say what the runs show. A smoke test has no verdict."""
    if smoke_test(results):
        return []
    seeds = results["seeds"]
    depth = seeds[0]["before"]["layers"][-1]

    ends = {
        arm: [mean(at(run[arm], "identity", n) for run in seeds) for n in (0, depth)]
        for arm in ("aligned", "without")
    }
    course = {
        arm: f"{words.percent(first)} at the input and {words.percent(last)} after the last layer"
        for arm, (first, last) in ends.items()
    }
    lost = ends["aligned"][0] - ends["aligned"][1] > words.KEPT
    said = [
        f"The LLM {'loses part' if lost else 'keeps nearly all'} of what its image tokens show: a "
        "linear classifier (probe) recognises a photograph by them with an accuracy of "
        f"{course['aligned']} after stage one, and {course['without']} after stage two without PRe."
    ]
    half = f"mean of layers {depth // 2} to {depth}"
    measures: dict[str, Measure] = {
        f"Probe of the photograph, {half}": partial(deep, key="identity"),
        f"Probe of the kind, {half}": partial(deep, key="probe"),
        f"Contrast ratio, {half}": partial(deep, key="contrast"),
        "Right answers": right,
    }
    for name, of in measures.items():
        without, with_ = ([of(run[arm]) for run in seeds] for arm in ("without", "with"))
        said.append(effect(name, without, with_))
    if len(seeds) < words.SEVERAL:
        said.append("So few seeds cannot rule out chance: use --seeds 5.")
    return said


def rows(results: Results) -> list[tuple[str, ...]]:
    """Return the rows of the table: a metric, and its mean for each of `ARMS`."""
    seeds = results["seeds"]
    depth = seeds[0]["before"]["layers"][-1]
    wanted: dict[str, Measure] = {"right answers ↑": right}
    for name, key in (
        ("which photograph", "identity"),
        ("which kind", "probe"),
        ("contrast ratio", "contrast"),
    ):
        for layer in (0, depth // 2, depth):
            wanted[f"{name}, layer {layer} ↑"] = partial(at, key=key, layer=layer)
        wanted[f"{name}, mean {depth // 2} to {depth} ↑"] = partial(deep, key=key)
    wanted[f"patches in five words, layer {depth} ↓"] = partial(at, key="lens_share", layer=depth)
    return [
        (name, *(spread([of(run[arm]) for run in seeds]) for arm in ARMS))
        for name, of in wanted.items()
    ]


def caption(results: Results) -> str:
    """Explain the table."""
    settings = results["settings"]
    options = results["arms"]["with"]["options"]
    numbers = ", ".join(str(run["seed"]) for run in results["seeds"])
    return (
        f"PRe with {options or 'the options of the paper'}, {settings['tune_steps']} steps of "
        f"{settings['batch']} scenes in stage two; seeds {numbers}. Each scene has four "
        "photographs, and linear probes see the mean of each one's patches. “Which photograph” "
        "recognises it among all of its half in other scenes, which stage two does not ask; "
        "knowing the kind alone gives an accuracy of about 0.10. “Which kind” names its kind "
        f"(chance {CHANCE:.2f}), as the questions of stage two do; it is fitted on one half of the "
        "photographs and tested on the other, both ways. All values come from photographs that no "
        "training saw. The contrast ratio is the mean cosine similarity of patches of one thing "
        "divided by that of patches of different things. “Patches in five words” is the share of "
        "patches that the logit lens decodes to the five most frequent words."
    )


def lens(results: Results) -> list[str]:
    """Say which words patches decode to in the last layer, for seed 0."""
    run = results["seeds"][0]
    return [
        f"Patches decode in the last layer, {name}, most often to: "
        + ", ".join(repr(word) for word in run[arm]["words"][-1])
        + "."
        for arm, (name, _) in ARMS.items()
    ]


def document(results: Results, scene: dict[str, str] | None) -> dict[str, Any]:
    """Return the results as a document for `diagnostics.report.page.html`."""
    seeds = results["seeds"]
    depth = seeds[0]["before"]["layers"][-1]
    names = METRICS | {"identity": "linear_probe", "lens_share": "lens_share"}
    del names["probe"]

    def table(metrics: Metrics) -> list[dict[str, Any]]:
        return [
            {"layer": layer}
            | {metric: metrics[name][n] for name, metric in names.items() if name in metrics}
            for n, layer in enumerate(metrics["layers"])
        ]

    options = results["arms"]["with"]["options"] or {}
    return {
        "title": f"{TITLE}, without and with PRe",
        "verdict": verdict(results),
        "about": words.ABOUT,
        "warning": words.SMOKE if smoke_test(results) else None,
        "scene": scene,
        "unit": "photographs",
        "models": [
            {
                "name": name,
                "style": style,
                "depth": depth,
                "runs": [table(run[arm]) for run in seeds],
            }
            for arm, (name, style) in ARMS.items()
        ],
        "marked": [options.get("layer") or depth // 2],
        "curves": [
            {
                "name": f"with PRe, seed {run['seed']}",
                "label": "L_PRe in stage two",
                "values": run["with"]["pre_loss"],
                "style": {"color": COLOURS[1], "linestyle": DASHES[n % len(DASHES)]},
            }
            for n, run in enumerate(seeds)
        ],
        "findings": lens(results),
        "notes": [caption(results), f"Settings: {results['settings']}."],
        "data": {"images": 2 * results["settings"]["test_scenes"], "masks": "the outlines"},
    } | {name: results[name] for name in ("device", "versions", "date")}


def picture(scene: Any) -> dict[str, str]:
    """Return a scene as {"picture": PNG in base64, "caption": text}."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(scene.image.permute(1, 2, 0).numpy()).save(file, format="PNG")
    things = "; ".join(
        f"{place}: {thing.name} ({CATEGORIES[thing.category]})"
        for place, thing in zip(PLACES, scene.things, strict=True)
    )
    return {
        "picture": base64.b64encode(file.getvalue()).decode(),
        "caption": f"A scene of photographs that no training saw. {things}.",
    }


def markdown(results: Results) -> str:
    """Return the verdict, the table and where it comes from, as Markdown."""
    said = verdict(results) or [words.SMOKE]
    lines = [f"# {TITLE}", "", *(f"- {sentence}" for sentence in said), ""]
    lines += markdown_table(("", *(name for name, _ in ARMS.values())), rows(results))
    lines += ["", caption(results), "", *(f"- {sentence}" for sentence in lens(results)), ""]
    return "\n".join([*lines, took(results), ""])


def show(results: Results, paths: Sequence[Path], out: Path, console: Console) -> None:
    """Print the verdict, the table, and where the files are."""
    console.print(" ".join(verdict(results)) or words.SMOKE, highlight=False)
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    for name, _ in ARMS.values():
        table.add_column(name, justify="right")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    names = ", ".join(str(path.relative_to(out)) for path in paths)
    console.print(f"Files in {out}: {names}", soft_wrap=True, highlight=False, markup=False)


def save(
    results: Results, folder: Path, scene: dict[str, str] | None = None
) -> tuple[list[Path], list[str]]:
    """Write the results, and seed 0's logs of the second stage with their plots. Return the paths
    of the files that were written, and why others were not."""
    first = results["seeds"][0]
    logs = {folder / "trace" / arm / trace.STATE: arm for arm in ("without", "with")}

    def log(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps({"log_history": first[logs[path]]["trace"]}))

    shown = document(results, scene)
    files: dict[str, Callable[[Path], object]] = {
        "demo.json": lambda path: write(path, json.dumps(results, indent=1) + "\n"),
        "demo.md": lambda path: write(path, markdown(results)),
        "demo.html": lambda path: write(path, page.html(shown)),
        "demo.png": lambda path: draw(shown, path, shown["warning"] or "", RECOGNISED),
        **{str(path.relative_to(folder)): log for path in logs},
        **{
            name: partial(trace.draw, list(logs), None, metric, "score", None)
            for metric, name in TRACES.items()
        },
    }
    written = []
    problems = []
    for name, make in files.items():
        try:
            make(folder / name)
            written.append(folder / name)
        except OSError as error:
            problems.append(why(error, folder / name))
    return written, problems
