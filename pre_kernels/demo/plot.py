"""The plot: probe and contrast ratio over depth, and L_PRe along training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pre_kernels.diagnostics.report import plots
from pre_kernels.diagnostics.report.columns import COLUMNS

DIGITS = ("Linear probe: which digit?", "accuracy on unseen digits")


def draw(
    document: dict[str, Any], path: Path, note: str = "", probe: tuple[str, str] = DIGITS
) -> None:
    """Write the plot of a `results.document`. Thin lines are seeds, and bands are ± one standard
    deviation over them.

    Args:
        note: a line below the plot.
        probe: the title and the axis of the probe's panel.
    """
    models, marked, curves = (document[name] for name in ("models", "marked", "curves"))
    title, axis = probe
    panels = (COLUMNS["linear_probe"]._replace(title=title, axis=axis), COLUMNS["contrast"])
    figure, axes = plots.grid(len(panels) + 1)
    for place, panel in zip(axes, panels, strict=False):
        plots.over_depth(place, models, panel, marked)
    plots.steps(axes[-1], curves, curves[0]["label"])
    plots.legend(figure, models)
    if note:
        figure.supxlabel(note, fontsize=8.0, color="0.4")
    figure.savefig(path, dpi=120)
