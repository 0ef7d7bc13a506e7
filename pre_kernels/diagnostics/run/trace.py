"""Plots from trainings' logs: the paper's, of the task's score against a layer's probe accuracy
(arXiv 2603.20808), and the task losses of several runs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from .data import names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE = "trainer_state.json"
SUFFIXES = (".png", ".svg", ".pdf")


def draw(
    logs: list[Path],
    layer: int | None,
    metric: str,
    score: str,
    scores: list[Path] | None,
    out: Path,
) -> str:
    """Write the plot to `out`; returns a line for each run that says what it shows.

    Args:
        logs: trainer_state.json of each run, or folders that have one.
        layer: None: the middle one of those logged.
        metric: of the layer, as `LayerCallback` logs it.
        score: the name of the task's score in the log.
        scores: a CSV for each run with the columns step and score, instead.

    Raises:
        ValueError: for a wrong argument, as `name: got X, want Y`.
    """
    from ..report.plots import trajectory

    check_name(out)
    if scores is not None and len(scores) != len(logs):
        raise ValueError(f"scores: got {len(scores)} files for {len(logs)} logs, want one for each")
    named = run_names(logs)
    runs = [
        run(
            history(log),
            name,
            layer,
            metric,
            score,
            None if scores is None else table(scores[number]),
        )
        for number, (log, name) in enumerate(zip(logs, named, strict=True))
    ]
    check_folder(out)
    trajectory(runs).savefig(out, dpi=150)
    return "\n".join(
        f"{drawn['name']}: {len(drawn['steps'])} steps"
        + "".join(
            f", {drawn[f'{key}_name']} {drawn[key][0]:.3f} → {drawn[key][-1]:.3f}"
            for key in ("probe", "score")
        )
        for drawn in runs
    )


def draw_losses(logs: list[Path], out: Path) -> str:
    """Write the plot of the runs' task losses over steps to `out`; returns a line for each run that
    says what it shows.

    Args:
        logs: trainer_state.json of each run, or folders that have one.
        out: a name that ends in one of `SUFFIXES`.

    Raises:
        ValueError: for a wrong argument, as `name: got X, want Y`.
    """
    check_name(out)
    runs = [Losses(history(log), name) for log, name in zip(logs, run_names(logs), strict=True)]
    check_folder(out)
    loss_plot(runs).savefig(out, dpi=150)
    return "\n".join(map(str, runs))


class Losses:
    """The task loss of a run, by step.

    An entry of the log counts with its `task_loss`; without one, with its `loss` if it has no
    `pre_loss`, since L_PRe is not in that loss.

    Attributes:
        values: by step, in the order of the steps.
        mixed: True if no entry has a task loss, and `values` contain λ · L_PRe.
        left_out: the number of steps whose task loss is not known.

    Raises:
        ValueError: if no entry has a loss.
    """

    def __init__(self, entries: list[dict[str, Any]], name: str) -> None:
        self.name = name
        tasks = points(entries, "task_loss")
        plain = points([entry for entry in entries if "pre_loss" not in entry], "loss")
        every = points(entries, "loss")
        if not every and not tasks:
            raise ValueError(
                f"log: got no loss that is a number in {name}, want the {STATE} of a training that "
                "logged its loss (logging_steps)"
            )
        values = plain | tasks
        self.mixed = not tasks and len(plain) < len(every)
        if self.mixed:
            values = every
        self.values = dict(sorted(values.items()))
        self.left_out = len(every.keys() - values.keys())

    def __str__(self) -> str:
        steps = [*self.values]
        losses = [*self.values.values()]
        said = (
            f"{self.name}: steps {steps[0]} to {steps[-1]}, {len(steps)} logged, "
            f"{'loss' if self.mixed else 'task loss'} {losses[0]:.4f} → {losses[-1]:.4f}"
        )
        if self.mixed:
            said += "; this curve contains λ·L_PRe: the log has pre_loss, but no task_loss"
        if self.left_out:
            said += f"; {self.left_out} steps with pre_loss but no task_loss are left out"
        return said


def loss_plot(runs: Sequence[Losses]) -> Figure:
    """All runs in one plot: each as logged, in a light line, and smoothed."""
    from ..report.plots import grid, legend, styles

    figure, (axes,) = grid(1)
    figure.set_size_inches(7.0, 4.2)
    curves = [{"name": run.name + (" (contains λ·L_PRe)" if run.mixed else "")} for run in runs]
    for run, style in zip(runs, styles(curves), strict=True):
        steps = [*run.values]
        losses = [*run.values.values()]
        colour = style["color"]
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smoothed(losses), **style, linewidth=1.8, marker=marker)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("task loss (without λ·L_PRe)")
    legend(axes, curves)
    return figure


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over the values around each, about a twentieth of all; at an end fewer, as many on
    either side."""
    most = len(values) // 40
    means = []
    for place in range(len(values)):
        reach = min(most, place, len(values) - 1 - place)
        means.append(mean(values[place - reach : place + reach + 1]))
    return means


def check_name(out: Path) -> None:
    """Raise a ValueError for a name that is not of a picture."""
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out: got {str(out)!r}, want a name that ends in {', '.join(SUFFIXES)}")


def check_folder(out: Path) -> None:
    """Raise a ValueError if there is no folder for it."""
    if not out.parent.is_dir():
        raise ValueError(f"out: {out.parent} is not a folder; make it: mkdir -p {out.parent}")


def run_names(logs: list[Path]) -> list[str]:
    """A name for each run, by its folder."""
    return unique([path.parent if path.name == STATE else path for path in logs])


def history(path: Path) -> list[dict[str, Any]]:
    """What a trainer logged: `log_history` of its state, in a folder that of the last
    checkpoint."""
    path = state_file(path)
    where = f"log: cannot read {path}, want the {STATE} of a transformers.Trainer"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    entries = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{where}: it has no log_history, a list of objects")
    return entries


def state_file(path: Path) -> Path:
    """The file of the trainer's state that is meant: the path itself, or a file in it or in its
    last checkpoint."""
    if not path.exists():
        raise ValueError(f"log: {path} is not there, want the {STATE} of a training, or its folder")
    if not path.is_dir():
        return path
    checkpoints = [p for p in path.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    checkpoints.sort(key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for folder in (path, *checkpoints):
        if (folder / STATE).exists():
            return folder / STATE
    raise ValueError(
        f"log: {path} has no {STATE}, neither itself nor in a folder checkpoint-*, want a folder "
        "to which a Trainer has saved a checkpoint, or trainer.save_state()"
    )


def run(
    entries: list[dict[str, Any]],
    name: str,
    layer: int | None,
    metric: str,
    score: str,
    scores: dict[int, float] | None,
) -> dict[str, Any]:
    """The steps of one run that have both a metric of the layer and a score; `scores`: by step,
    instead of those in the log."""
    suffix = f"/{metric}"
    keys = {
        key
        for entry in entries
        for key in entry
        if key.startswith("layer_") and key.endswith(suffix)
    }
    numbers = {key[len("layer_") : -len(suffix)] for key in keys}
    layers = sorted(int(number) for number in numbers if number.isascii() and number.isdecimal())
    if not layers:
        logged = {
            key.partition("/")[2] for entry in entries for key in entry if key[:6] == "layer_"
        }
        instead = f", or --metric with one of {', '.join(sorted(logged))}" if logged else ""
        raise ValueError(
            f"log: {name} has no metric {metric!r} of a layer, want a training with LayerCallback"
            f"{instead}; --loss draws the loss, which every log has"
        )
    number = layers[len(layers) // 2] if layer is None else layer
    if number not in layers:
        raise ValueError(
            f"layer: got {number}, want one of those in {name}: {', '.join(map(str, layers))}"
        )
    key = f"layer_{number}{suffix}"
    probe = points(entries, key)
    scored = points(entries, score) if scores is None else scores
    steps = sorted(probe.keys() & scored.keys())
    if not steps:
        others = sorted({k for e in entries for k in e if k.startswith("eval_") or k == "score"})
        raise ValueError(
            f"score: {name} has no step with both {key!r} ({len(probe)} steps) and {score!r} "
            f"({len(scored)}) as numbers; pass score= to LayerCallback, or evaluate at the same "
            f"steps; the log has {', '.join(others) or 'no scores'}"
            f"{', which --score draws' if others else ''}"
        )
    return {
        "name": name,
        "steps": steps,
        "probe": [probe[step] for step in steps],
        "score": [scored[step] for step in steps],
        "probe_name": f"{metric.replace('_', ' ')}, layer {number}",
        "score_name": score.removeprefix("eval_").replace("_", " "),
    }


def points(entries: list[dict[str, Any]], key: str) -> dict[int, float]:
    """The values of a key by step; what is not a finite number is left out."""
    return {
        entry["step"]: entry[key]
        for entry in entries
        if is_number(entry.get("step")) and is_number(entry.get(key))
    }


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def table(path: Path) -> dict[int, float]:
    """Scores by step."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            scores = {int(row["step"]): float(row["score"]) for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"scores: cannot read {path}, want a CSV with columns step and score: {error!r}"
        ) from error
    if not scores or not all(map(math.isfinite, scores.values())):
        raise ValueError(f"scores: {path} has {len(scores)} rows, want finite scores, at least one")
    return scores


def unique(paths: list[Path]) -> list[str]:
    """The end of each path that tells it apart."""
    return names(tuple(str(path) for path in paths))
