"""The picture: probe and contrast ratio over depth, and L_PRe along training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

STYLES = {
    "before": ("text-only LLM, before visual training", "0.6", ":"),
    "without": ("LLaVA's two stages without PRe", "tab:orange", "-"),
    "with": ("with PRe", "tab:blue", "-"),
}


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture; bands are ± one standard deviation over seeds, thin lines are the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = found["settings"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    probe, contrast, training = figure.subplots(1, 3)
    depth = np.arange(settings["layers"] + 1)
    for axes, key, title in (
        (probe, "probe", "linear probe: which digit?"),
        (contrast, "contrast", "semantic contrast ratio"),
    ):
        for arm, (label, colour, dash) in STYLES.items():
            values = np.array([seed[arm][key] for seed in found["seeds"]])
            axes.plot(depth, values.T, color=colour, linestyle=dash, linewidth=0.6, alpha=0.6)
            axes.plot(depth, values.mean(0), color=colour, linestyle=dash, linewidth=2, label=label)
            if len(values) > 1:
                mean, sd = values.mean(0), values.std(0, ddof=1)
                axes.fill_between(depth, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
        axes.axvline(settings["layer"], color="0.8", zorder=0)
        axes.set(title=title, xlabel="LLM layers behind the visual tokens", xticks=depth)
    probe.set_ylabel("accuracy on unseen digits")
    contrast.set_ylabel("cohesion / coupling")
    probe.legend(fontsize=8)

    for seed in found["seeds"]:
        curve = seed["with"]["train_pre_loss"]
        label = f"training with PRe, seed {seed['seed']}"
        training.plot(np.arange(1, len(curve) + 1), curve, linewidth=1, label=label)
    training.axvline(settings["align_steps"], color="0.8", zorder=0)
    training.set(title=f"L_PRe at layer {settings['layer']}", xlabel="step (alignment, then instruction tuning)")
    training.legend(fontsize=8)
    figure.savefig(path, dpi=120)
