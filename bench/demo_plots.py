"""Pictures of the demo's results, in large type: the linear probe over depth, and the loss during
training."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from pre_kernels.demo import plot, results
from pre_kernels.diagnostics.report import plots

# The picture is wide, and readable at half its size.
SIZE = (8.0, 3.6)
STYLE: dict[Any, Any] = {
    **plots.STYLE,
    "font.size": 13.0,
    "axes.titlesize": 14.0,
    "legend.fontsize": 12.0,
}

Results = dict[str, Any]


def demo(found: Results, path: Path, note: str = "") -> None:
    """Draw the picture that the demo itself writes."""
    plot.draw(results.document(found), path, note)


def probe(found: Results, path: Path, note: str = "") -> None:
    """Draw the linear probe over depth without and with PRe: means over seeds, and bands from the
    smallest to the largest."""
    axes, figure = axes_with(note)
    layers = range(found["settings"]["layers"] + 1)
    for arm in ("without", "with"):
        name, style = results.ARMS[arm]
        runs = [[100 * value for value in seed[arm]["probe"]] for seed in found["seeds"]]
        centre = [mean(values) for values in zip(*runs, strict=True)]
        spans = [(min(values), max(values)) for values in zip(*runs, strict=True)]
        axes.plot(layers, centre, **style, linewidth=3, marker="o", label=name)
        axes.fill_between(layers, *zip(*spans, strict=True), color=style["color"], alpha=0.15)
    layer = found["settings"]["layer"]
    axes.axvline(layer, **plots.MARK)
    axes.text(layer + 0.1, axes.get_ylim()[0], "PRe reads here", va="bottom", color="0.4")
    axes.set(
        title="Which digit is under this patch? Linear probe on image tokens",
        xlabel="LLM layer (0: the embeddings that enter the LLM)",
        ylabel="accuracy, %",
    )
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=120)


def pre_loss(found: Results, path: Path, note: str = "") -> None:
    """Draw L_PRe over the steps of the training with PRe, with a line for each seed."""
    axes, figure = axes_with(note)
    colour = results.ARMS["with"][1]["color"]
    for dash, seed in zip(plots.DASHES, found["seeds"], strict=False):
        values = seed["with"]["train_pre_loss"]
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=colour, linestyle=dash, label=f"seed {seed['seed']}")
    begin = found["settings"]["align_steps"]
    axes.axvline(begin, **plots.MARK)
    axes.text(begin + 5, axes.get_ylim()[1], "the LLM is trained too", va="top", color="0.4")
    axes.set(
        title="A healthy L_PRe falls fast, then levels off above −1",
        xlabel="training step",
        ylabel="L_PRe (minus cosine)",
    )
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=120)


def axes_with(note: str) -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
    if note:
        figure.supxlabel(note, fontsize=8.0, color="0.4")
    return axes, figure
