"""The plot: probe and contrast ratio over depth, and L_PRe along training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pre_kernels.diagnostics.report import plots
from pre_kernels.diagnostics.report.columns import COLUMNS

PANELS = (
    COLUMNS["linear_probe"]._replace(
        title="Linear probe: which digit?", axis="accuracy on unseen digits"
    ),
    COLUMNS["contrast"],
)


def draw(document: dict[str, Any], path: Path, note: str = "") -> None:
    """Write the plot of a `results.document`. Thin lines are seeds, and bands are ± one standard
    deviation over them. `note` is a line below the plot."""
    models, marked, curves = (document[name] for name in ("models", "marked", "curves"))
    figure, axes = plots.grid(len(PANELS) + 1)
    for place, panel in zip(axes, PANELS, strict=False):
        plots.over_depth(place, models, panel, marked)
    plots.steps(axes[-1], curves, curves[0]["label"])
    plots.legend(figure, models)
    if note:
        figure.supxlabel(note, fontsize=8.0, color="0.4")
    figure.savefig(path, dpi=120)
