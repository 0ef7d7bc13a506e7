"""The pictures of PRe on the little LLaVA of real parts, over depth and along training."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from pre_kernels.demo.real import results
from pre_kernels.demo.real.results import at
from pre_kernels.diagnostics.report import plots
from pre_kernels.diagnostics.report.columns import COLUMNS
from pre_kernels.diagnostics.run import trace

from .demo_plots import axes_with
from .evidence_real import (
    CHOSEN,
    CONFIRM,
    LAYERS,
    MAIN,
    PAPER,
    SEARCH,
    START,
    WITHOUT,
    Records,
)

# The trainings that are drawn: their names and styles.
SHOWN: dict[str, tuple[str, dict[str, str]]] = {
    **{arm: results.ARMS[arm] for arm in START},
    WITHOUT: results.ARMS["without"],
    PAPER: ("PRe, the paper's settings", results.ARMS["with"][1]),
    CHOSEN: (f"PRe, {CHOSEN}", {"color": plots.COLOURS[2], "linestyle": "-"}),
}
RECOGNISED = COLUMNS["linear_probe"]._replace(
    name="identity", title="Probe: which photograph?", axis="accuracy in other scenes"
)


def shown(records: Records) -> list[dict[str, Any]]:
    """Return the records of `SHOWN` in the confirmation, or in the search before there are any, of
    the settings of the first."""
    own = [entry for entry in records if entry["settings"]["llm"] == MAIN and entry["arm"] in SHOWN]
    confirmed = [entry for entry in own if entry["seed"] in CONFIRM]
    chosen = confirmed or [entry for entry in own if entry["seed"] in SEARCH]
    return [entry for entry in chosen if entry["settings"] == chosen[0]["settings"]]


def caption(records: Records) -> str:
    """Return what `depth` shows, in words."""
    own = shown(records)
    last = {
        arm: mean(at(entry, "identity", LAYERS) for entry in own if entry["arm"] == arm)
        for arm in (WITHOUT, PAPER, CHOSEN)
    }
    seeds = len({entry["seed"] for entry in own})
    return (
        "SmolLM2-135M-Instruct as the LLM of a little LLaVA, on photographs: in its last layer a "
        "linear probe on image tokens recognises a photograph with an accuracy of "
        f"{last[WITHOUT]:.0%} without PRe, {last[PAPER]:.0%} with the paper's settings, and "
        f"{last[CHOSEN]:.0%} with the encoder's features as target and λ = 8. Lines: mean of "
        f"{seeds} seeds; bands: ± one standard deviation."
    )


def depth(records: Records, path: Path, note: str = "") -> list[str]:
    """Draw the lines of `SHOWN` over the layers: means over the seeds of `shown`; thin lines are
    seeds. Return the names of what was drawn."""
    models = _models(records)
    panels = (
        RECOGNISED,
        COLUMNS["linear_probe"]._replace(
            title="Probe: which kind?", axis="accuracy on other photographs"
        ),
        COLUMNS["contrast"]._replace(scale="log"),
    )
    figure, axes = plots.grid(len(panels))
    for place, panel in zip(axes, panels, strict=True):
        plots.over_depth(place, models, panel, [LAYERS // 2])
    plots.legend(figure, models)
    if note:
        figure.supxlabel(note, fontsize=8.0, color="0.4")
    figure.savefig(path, dpi=120)
    return [model["name"] for model in models]


def probe(records: Records, path: Path, note: str = "") -> None:
    """Draw the first panel of `depth` in large type."""
    axes, figure = axes_with(note)
    models = _models(records)
    plots.over_depth(axes, models, RECOGNISED, [LAYERS // 2])
    axes.text(LAYERS / 2 + 0.3, axes.get_ylim()[0], "PRe reads here", va="bottom", color="0.4")
    axes.set(
        title="Which photograph is this? Linear probe on image tokens",
        xlabel="LLM layer (0: the embeddings that enter the LLM)",
        ylabel="accuracy",
    )
    plots.legend(axes, models, loc="upper right", frameon=False, fontsize=12.0)
    figure.savefig(path, dpi=120)


def training(found: results.Results, path: Path, note: str, metric: str) -> None:
    """Draw a metric of the middle layer and the task's score along stage two of the first seed, as
    `pre-kernels trace` does, for a run of the demo."""
    first = found["seeds"][0]
    runs = []
    for arm in ("without", "with"):
        name, style = results.ARMS[arm]
        run = trace.run(first[arm]["trace"], name, None, metric, "score", None)
        runs.append(run | {"style": style})
    figure = plots.trajectory(runs)
    if note:
        figure.supxlabel(note, fontsize=8.0, color="0.4")
    figure.savefig(path, dpi=120)


def _models(records: Records) -> list[dict[str, Any]]:
    """Return the lines of `SHOWN` for `plots.over_depth`."""
    own = shown(records)
    models = []
    for arm, (name, style) in SHOWN.items():
        runs = [_table(entry) for entry in own if entry["arm"] == arm]
        if runs:
            models.append({"name": name, "style": style, "runs": runs})
    return models


def _table(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "identity": entry["identity"][n],
            "linear_probe": entry["probe"][n],
            "contrast": entry["contrast"][n],
        }
        for n, layer in enumerate(entry["layers"])
    ]
