"""The plots of a report: curves over depth and over training, the paper's trajectory, heat maps on
an image.

Needs matplotlib, which is imported at the first plot. Nothing here uses pyplot, so no state is
shared or left behind.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from .columns import PROBES, Column, by_layer, measured_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart. Dashes tell lines apart even
# when they are printed in grey. The first model, the one without PRe, is orange everywhere, and the
# second, the one with it, blue.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARK: dict[str, Any] = {"color": "0.75", "linewidth": 1.5, "zorder": 0}
# The width and height of a panel in inches.
PANEL = (4.3, 2.75)
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
# Colours of a plot that would be hard to see on a dark page, and what they are there.
DARK = {
    "#000000": "#e6e9ee",  # text and ticks
    "#666666": "#a0a9b8",  # axes
    "#ebebeb": "#2f3641",  # the grid
    "#bfbfbf": "#5f6876",  # marks
    "#d55e00": "#ee8031",
    "#0072b2": "#4aa8e8",
    "#009e73": "#2bc79b",
}
# The axis of a probe spans at least this much, so that noise does not look like a course.
LEAST_SPAN = 0.2
Runs = Sequence[Sequence[Mapping[str, Any]]]


def depth(
    models: Sequence[Mapping[str, Any]],
    panels: Sequence[Column] | None = None,
    marked: Sequence[int] = (),
) -> Figure:
    """Curves over depth, with a panel for each metric and a line for each model. With several runs,
    the line is their mean, with a band of ± 1 standard deviation.

    Args:
        models: {"name": str, "runs": [[row, ...], ...]} each. A row is a dict with "layer" and
            metrics of `LayerReport.rows()`. Missing keys and None are not drawn. Optional "style":
            keywords of matplotlib's Line2D.
        panels: the metrics to draw. None: all `COLUMNS` that were measured for a model.
        marked: layers that get a grey vertical line, where PRe reads.

    Raises:
        ValueError: there is nothing to draw.
    """
    panels = measured_columns(models) if panels is None else panels
    if not panels:
        raise ValueError("models: got no value of any metric, want at least one")
    figure, axes = grid(len(panels))
    for place, panel in zip(axes, panels, strict=True):
        over_depth(place, models, panel, marked)
    legend(figure, models)
    return figure


def grid(count: int) -> tuple[Figure, list[Axes]]:
    """An empty figure of `count` panels, at most three in a row. Four panels are two rows of
    two."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
        return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def styles(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The line style of each model: its own, or the next colour and dash."""
    return [
        {
            "color": COLOURS[n % len(COLOURS)],
            "linestyle": DASHES[n % len(DASHES)],
            **model.get("style", {}),
        }
        for n, model in enumerate(models)
    ]


def legend(place: Figure | Axes, curves: Sequence[Mapping[str, Any]], **keywords: Any) -> None:
    """Draw a line and a name for each of `curves`, above the panels of a figure or inside axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if isinstance(place, Figure):
        keywords = {
            "loc": "outside upper center",
            "ncols": min(len(curves), 4),
            "handlelength": 2.5,
        } | keywords
    lines = [Line2D([], [], linewidth=2, **style) for style in styles(curves)]
    with rc_context(STYLE):
        made = place.legend(lines, ["name"] * len(lines), **keywords)
    # Names are the user's own. Without this, matplotlib would read dollars as mathematics and hide
    # names that begin with an underscore.
    for text, curve in zip(made.get_texts(), curves, strict=True):
        text.set(text=curve["name"], parse_math=False)


def over_depth(
    axes: Axes, models: Sequence[Mapping[str, Any]], panel: Column, marked: Sequence[int] = ()
) -> None:
    """Draw one panel of `depth` into `axes`, without a legend."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for model, style in zip(models, styles(models), strict=True):
        _curve(axes, model["name"], model["runs"], panel.name, style)
    for layer in marked:
        axes.axvline(layer, **MARK)
    title = panel.title + panel.arrow if panel.title else ""
    axes.set(title=title, xlabel="LLM layer", ylabel=panel.axis)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], min_n_ticks=3))
    if panel.scale == "log":
        # The default labels of a span below a decade are such as 6 x 10^0.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    if panel.in_unit_interval:
        low, high = axes.get_ylim()
        if panel.name in PROBES and high - low < LEAST_SPAN:
            middle = min(max((low + high) / 2, LEAST_SPAN / 2), 1 - LEAST_SPAN / 2)
            low, high = middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2
        # Markers at 0 and 1 stay whole.
        edge = 0.018 * (high - low)
        low = -edge if low <= 0 else low
        high = 1 + edge if high >= 1 else high
        axes.set_ylim(low, high)
        if panel.name in PROBES:
            _chance(axes, models)


def _chance(axes: Axes, models: Sequence[Mapping[str, Any]]) -> None:
    """Draw the accuracy of a guess, if it is known and inside the axes."""
    found = {
        value
        for model in models
        for values in by_layer(model["runs"], "probe_chance").values()
        for value in values
    }
    low, high = axes.get_ylim()
    for value in found:
        if low <= value <= high:
            axes.axhline(value, color="0.4", linewidth=1, linestyle=":", zorder=0)
            axes.text(
                1, value, "chance", transform=axes.get_yaxis_transform(), ha="right", va="bottom",
                color="0.4", fontsize=7.5,
            )  # fmt: skip


def _curve(axes: Axes, name: str, runs: Runs, metric: str, style: Mapping[str, Any]) -> None:
    """Draw the mean over the runs. If there are several, also draw each run and a band."""
    by_number = by_layer(runs, metric)
    if not by_number:
        return
    centre = [mean(values) for values in by_number.values()]
    if len(runs) > 1:
        for run in runs:
            layers = by_layer([run], metric)
            axes.plot(
                [*layers],
                [values[0] for values in layers.values()],
                **{**style, "linewidth": 0.6, "alpha": 0.6},
            )
        half = [stdev(values) if len(values) > 1 else 0.0 for values in by_number.values()]
        low, high = ([c + sign * h for c, h in zip(centre, half, strict=True)] for sign in (-1, 1))
        axes.fill_between([*by_number], low, high, color=style["color"], alpha=0.15, linewidth=0)
    line = {"linewidth": 2, "marker": "o", "markersize": 3.5, **style}
    axes.plot([*by_number], centre, **line, label=name)


def steps(axes: Axes, curves: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Draw values along training, with a line and a legend entry for each of `curves`.

    Args:
        axes: one that `grid` made.
        curves: {"name": str, "values": [float | None, ...]} each. Optional: "steps" (one for each
            value; default: 1, 2, …), "marked" (steps that get a grey vertical line) and "style" as
            for `depth`.
        title: the title of the panel.
    """
    for curve, style in zip(curves, styles(curves), strict=True):
        values = _numbers(curve["values"])
        at = curve.get("steps") or range(1, len(values) + 1)
        axes.plot(at, values, **{"linewidth": 1.2, **style}, label=curve["name"])
    for step in {step for curve in curves for step in curve.get("marked", ())}:
        axes.axvline(step, **MARK)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("training step")
    legend(axes, curves)


def trajectory(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """The paper's plot of a training: task score and probe over steps, and one against the other
    (arXiv 2603.20808).

    Args:
        runs: {"name": str, "steps": [int, ...], "probe": [float | None, ...], "score": [float |
            None, ...], "probe_name": str, "score_name": str} each, with lists of equal length.
            Optional "style" as for `depth`. The names of the first run label the axes. The plot of
            score against probe has a point for each step at which both were measured. Points are
            joined in the order of steps, and later ones are darker.

    Raises:
        ValueError: no runs, or lists of different lengths.
    """
    from matplotlib import rc_context
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    if not runs:
        raise ValueError("runs: got none, want at least one")
    for run in runs:
        lengths = {name: len(run[name]) for name in ("steps", "probe", "score")}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"runs: got lists of lengths {lengths} in {run['name']!r}, want equal ones"
            )
    with rc_context(STYLE):
        figure = Figure(figsize=(2.4 * PANEL[0], 1.5 * PANEL[1]), layout="constrained")
        axes: dict[str, Axes] = figure.subplot_mosaic([["score", "both"], ["probe", "both"]])
    axes["score"].sharex(axes["probe"])
    axes["score"].tick_params(labelbottom=False)
    every = [step for run in runs for step in run["steps"]]
    colours: dict[str, Any] = {
        "norm": Normalize(min(every, default=0), max(every, default=1)),
        "cmap": "viridis_r",
    }

    for run, style in zip(runs, styles(runs), strict=True):
        points = sorted(
            zip(run["steps"], _numbers(run["probe"]), _numbers(run["score"]), strict=True)
        )
        line = {"marker": "o", "markersize": 3.5, **style}
        axes["probe"].plot(
            [step for step, _, _ in points], [probe for _, probe, _ in points], **line
        )
        axes["score"].plot(
            [step for step, _, _ in points], [score for _, _, score in points], **line
        )
        both = [point for point in points if math.isfinite(point[1]) and math.isfinite(point[2])]
        if both:
            at, x, y = zip(*both, strict=True)
            axes["both"].plot(x, y, **{"linewidth": 1, **style}, zorder=1)
            axes["both"].scatter(x, y, c=at, **colours, edgecolors=style["color"], zorder=2)
    names = {key: runs[0].get(f"{key}_name", key) for key in ("score", "probe")}
    for key, name in names.items():
        axes[key].set_ylabel(name, parse_math=False)
    axes["probe"].set_xlabel("training step")
    axes["both"].set_xlabel(names["probe"], parse_math=False)
    axes["both"].set_ylabel(names["score"], parse_math=False)
    figure.colorbar(ScalarMappable(**colours), ax=axes["both"], label="training step", pad=0.02)
    legend(figure, runs)
    return figure


def heat_maps(heat_map: Mapping[str, Any]) -> Figure:
    """One image with a chosen patch, and the similarity of that patch with all patches, with a row
    for each model and a column for each layer.

    All maps share one colour scale, from the smallest similarity to 1.

    Args:
        heat_map: {"image": the name of the image, "picture": a PNG in base64, "grid": [rows,
            columns], "patch": [row, column], "layers": [int, ...], "similarity": {name of a model:
            for each layer the rows · columns values of `similarity_map`}}.

    Raises:
        ValueError: a model has a different number of layers, or a map a different number of
            patches.
    """
    from matplotlib import rc_context
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import imread
    from matplotlib.patches import Rectangle

    picture = imread(io.BytesIO(base64.b64decode(heat_map["picture"])), format="png")
    height, width = picture.shape[:2]
    rows, columns = heat_map["grid"]
    row, column = heat_map["patch"]
    layers = heat_map["layers"]
    similarity = heat_map["similarity"]
    for name, maps in similarity.items():
        sizes = {len(values) for values in maps}
        if len(maps) != len(layers) or sizes - {rows * columns}:
            raise ValueError(
                f"similarity: got {len(maps)} maps of {sorted(sizes)} patches of {name!r}, want "
                f"{len(layers)} of {rows * columns}"
            )

    scale = Normalize(
        min((v for maps in similarity.values() for values in maps for v in values), default=0), 1
    )
    # Whatever the shape of the image, its tile has an area of 1.5 x 1.5 inches.
    tile_width = 1.5 / math.sqrt(height / width)
    tile_height = 1.5 * math.sqrt(height / width)
    size = (tile_width * (len(layers) + 1) + 1, (tile_height + 0.12) * len(similarity) + 0.3)
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(similarity), len(layers) + 1, squeeze=False)
    shown = None
    for number, (line, (name, maps)) in enumerate(zip(axes, similarity.items(), strict=True)):
        line[0].imshow(picture, extent=(0, width, height, 0), cmap="gray", interpolation="nearest")
        line[0].set_ylabel(name, parse_math=False)
        for place, layer, values in zip(line[1:], layers, maps, strict=True):
            table = [values[start : start + columns] for start in range(0, rows * columns, columns)]
            shown = place.imshow(
                table,
                norm=scale,
                cmap="viridis",
                extent=(0, width, height, 0),
                interpolation="nearest",
            )
            if number == 0:
                place.set_title(f"layer {layer}", fontsize=9)
        for place in line:
            cell = (width / columns, height / rows)
            corner = (column * width / columns, row * height / rows)
            place.add_patch(Rectangle(corner, *cell, fill=False, edgecolor="white", linewidth=2.4))
            place.add_patch(
                Rectangle(corner, *cell, fill=False, edgecolor=COLOURS[0], linewidth=1.4)
            )
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
    if shown is not None:
        figure.colorbar(
            shown, ax=axes, label="cosine similarity", pad=0.01, aspect=12 * len(similarity)
        )
    return figure


def svg(figure: Figure) -> str:
    """The figure as SVG without a background, in colours that follow the page's light or dark
    scheme. The same figure always gives the same SVG, and labels stay text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pre-kernels"}):
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None}, facecolor="none")
    text = buffer.getvalue().replace("fill: #ffffff", "fill: none")
    light, dark = (
        "".join(f"--c{name[1:]}: {colour}; " for name, colour in palette)
        for palette in (((name, name) for name in DARK), DARK.items())
    )
    for name in DARK:
        text = text.replace(f": {name}", f": var(--c{name[1:]})")
    rules = (
        f"svg {{ {light}}} text {{ fill: var(--c000000); }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark}}} }}"
    )
    return text.replace(" <defs>", f" <style>{rules}</style>\n <defs>", 1)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
