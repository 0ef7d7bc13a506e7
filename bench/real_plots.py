"""The picture of PRe on the little LLaVA of real parts: probes and contrast ratio over depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pre_kernels.demo.real import results
from pre_kernels.diagnostics.report import plots
from pre_kernels.diagnostics.report.columns import COLUMNS

from .evidence_real import CONFIRM, MAIN, PAPER, SEARCH, START, WITHOUT

# The trainings that are drawn.
SHOWN = (*START, WITHOUT, PAPER, "centred")
STYLES: dict[str, dict[str, str]] = {
    **{name: results.ARMS[name][1] for name in START},
    WITHOUT: results.ARMS["without"][1],
    PAPER: results.ARMS["with"][1],
    "centred": {"color": plots.COLOURS[2], "linestyle": "-"},
}
LAYER = 15


def depth(records: Sequence[dict[str, Any]], path: Path, note: str = "") -> list[str]:
    """Draw the lines of `SHOWN` over the layers: means over the seeds of the confirmation, or of
    the search before there are any; thin lines are seeds. Return the names of what was drawn."""
    own = [entry for entry in records if entry["settings"]["llm"] == MAIN]
    confirmed = [entry for entry in own if entry["seed"] in CONFIRM]
    members = confirmed or [entry for entry in own if entry["seed"] in SEARCH]
    models = []
    for arm in SHOWN:
        runs = [entry for entry in members if entry["arm"] == arm]
        if runs:
            name = results.ARMS[arm][0] if arm in START else arm
            tables = [_table(entry) for entry in runs]
            models.append({"name": name, "style": STYLES[arm], "runs": tables})
    panels = {
        "identity": COLUMNS["linear_probe"]._replace(
            name="identity", title="Probe: which photograph?", axis="accuracy in other scenes"
        ),
        "probe": COLUMNS["linear_probe"]._replace(
            title="Probe: which kind?", axis="accuracy on other photographs"
        ),
        "contrast": COLUMNS["contrast"]._replace(scale="log"),
    }
    figure, axes = plots.grid(len(panels))
    for place, panel in zip(axes, panels.values(), strict=True):
        plots.over_depth(place, models, panel, [LAYER])
    plots.legend(figure, models)
    if note:
        figure.supxlabel(note, fontsize=8.0, color="0.4")
    figure.savefig(path, dpi=120)
    return [model["name"] for model in models]


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
