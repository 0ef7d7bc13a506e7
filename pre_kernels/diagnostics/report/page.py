"""The rows of `LayerReport` for one or more models in words, as CSV, and as a self-contained HTML
page."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import pairwise
from statistics import mean
from typing import Any

from .columns import (
    COLUMNS,
    MAIN,
    PROBES,
    STAND_INS,
    Column,
    by_layer,
    main_columns,
    measured_columns,
)
from .statistics import effect, spread
from .verdict import about, deep, probe_size, ranges, verdict

Document = Mapping[str, Any]
TEMPLATE = "report.html.jinja"
# How many of the main metrics have their curves above everything that is folded: a row of them.
SHOWN = 3
# How many classes of the data the page names.
CLASSES = 30


def html(document: Document) -> str:
    """A page that shows everything in `document`. It has no script, loads nothing, adapts to light
    and dark, and escapes every name.

    Needs jinja2 and matplotlib, and scipy for models with three or more runs.

    Args:
        document: what `pre-kernels diagnose` writes as JSON:

            title: str
            models: [{"name": str, "depth": L, "runs": [[row, ...], ...], "notes": [str]}], with
                rows as `LayerReport.rows()` returns them and a run for each seed. All models have
                their runs in the same order. "style" as for `plots.depth`
            marked: [layer, ...], where PRe reads
            maps: [{"image", "picture", "grid", "patch", "layers", "similarity"}] as for
                `plots.heat_maps`
            curves: [{"name", "label", "values"}] as for `plots.steps`; curves with the same label
                share a plot
            findings: [str], printed before the folded sentences that are derived from the numbers
            notes: [str], printed under “How it was measured”
            command, date, device: str
            versions: {name: version}
            data: {"images": int, "listed": int, "left_out": {reason: [name, ...] or int},
                "labelled": int, "classes": [str, ...], "masks": str, "folder": str, "prompt": str};
                images are those that were measured, of those listed in the folder

            verdict: [str], the sentences shown first. Without it they are those of
                `verdict.verdict`
            about: str, what the report is about, below the verdict. Without it the measures of the
                verdict are explained
            warning: str, in a box above all. With it no verdict is derived
            scene: {"picture": a PNG in base64, "caption": str}, beside the verdict
            unit: str, what the probes classify (default: "images")

            Only title and models are required, and of a model only name and runs. None is the same
            as missing.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["options"] = _options
    template = environment.from_string(
        resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    models = document["models"]
    data = document.get("data") or {}
    shown = main_columns(models)[:SHOWN]
    verdict_texts = document.get("verdict")
    return template.render(
        title=document["title"],
        meta=[
            text for text in (document.get("date"), _images(data), document.get("device")) if text
        ],
        warning=document.get("warning"),
        verdict=verdict(document) if verdict_texts is None else verdict_texts,
        about=about(document),
        scene=document.get("scene"),
        said=document.get("findings") or [],
        findings=findings(document),
        legend=list(_legend(models)),
        panels=[_panel(document, column) for column in shown],
        others=[
            _panel(document, column) for column in measured_columns(models) if column not in shown
        ],
        marked=document.get("marked") or [],
        curves=list(_curves(document.get("curves") or [])),
        maps=[
            (heat_map, _map_image(heat_map), len(heat_map["layers"]) + 1)
            for heat_map in document.get("maps") or []
        ],
        tables=[(model["name"], *_table(model["runs"])) for model in models],
        notes=[*(document.get("notes") or []), *_notes(models)],
        facts=list(_facts(document, data)),
    )


def findings(document: Document) -> dict[str, list[str]]:
    """For each metric: its course over the depth of each model, and how each model differs from the
    one before it.

    Differences are of the mean over the deep half, layers from L/2 on, and of the last layer
    measured. Without masks, spatial contrast replaces the semantic contrast ratio. For a metric
    that was not measured, a sentence says what it needs.
    """
    models = document["models"]
    available = measured_columns(models)
    texts: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name in MAIN:
        column = COLUMNS[name]
        if column not in available:
            unknown.append(f"{column.title}: needs {column.needs}.")
            column = COLUMNS[STAND_INS.get(name, name)]
        if column in available:
            texts[column.title] = [_course(model, column) for model in models] + [
                text for a, b in pairwise(models) for text in _differences(a, b, column)
            ]
    if len(models) > 1 and any(len(model["runs"]) < 2 for model in models):
        unknown.append("Noise between seeds: needs several runs of each model.")
    return texts | ({"Not measured": unknown} if unknown else {})


def csv_text(document: Document) -> str:
    """A line for each model, run (numbered from 0) and layer, with the columns of all rows. None is
    an empty cell."""
    lines = [
        {"model": model["name"], "run": number, **row}
        for model in document["models"]
        for number, run in enumerate(model["runs"])
        for row in run
    ]
    buffer = io.StringIO()
    columns = list(dict.fromkeys(name for line in lines for name in line)) or ["model", "run"]
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _joined(value) for name, value in line.items()} for line in lines)
    return buffer.getvalue()


def _course(model: Mapping[str, Any], column: Column) -> str:
    """A sentence with the value of a metric at the first layer, at its minimum and at the last."""
    values = by_layer(model["runs"], column.name)
    if not values:
        return f"{model['name']}: not measured."
    first = min(values)
    last = max(values)
    least = min(values, key=lambda layer: mean(values[layer]))

    def shown(layer: int) -> str:
        return f"{spread(values[layer], digits=column.digits)} at layer {layer}"

    if first == last:
        return f"{model['name']}: {shown(first)}, the only layer measured."
    points = [
        shown(layer) + (" (the minimum)" if layer == least else "")
        for layer in sorted({first, least, last})
    ]
    runs = [by_layer([run], column.name) for run in model["runs"]]
    changes = [run[last][0] - run[first][0] for run in runs if first in run and last in run]
    change = f"; {spread(changes, '+', column.digits)} from first to last" if changes else ""
    return f"{model['name']}: {', '.join(points)}{change}."


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], column: Column) -> list[str]:
    """Sentences on how two models differ in the mean of the deep half, and in its last layer."""
    halves = [deep(model, column) for model in (before, after)]
    if not all(halves):
        return []
    texts: dict[str, str] = {}
    for start in (0, -1):
        layers = [[*runs[0]][start:] for runs in halves]
        old, new = (
            [mean(run[n] for n in chosen) for run in runs]
            for runs, chosen in zip(halves, layers, strict=True)
        )
        where = " and ".join(dict.fromkeys(map(ranges, layers)))
        name = ("mean of " if len(layers[0]) > 1 else "") + where
        texts[where] = _effect(
            name, old, new, (f"({before['name']})", f"({after['name']})"), column.digits
        )
    return [*texts.values()]


def _effect(
    name: str, before: list[float], after: list[float], names: tuple[str, str], digits: int
) -> str:
    if len(before) == len(after):
        return effect(name, before, after, names, digits)
    return (
        f"{name}: {spread(before, digits=digits)} {names[0]}, {spread(after, digits=digits)} "
        f"{names[1]}, difference of the means {mean(after) - mean(before):+.{digits}f}; "
        f"{len(before)} and {len(after)} runs cannot be paired."
    )


def _images(data: Mapping[str, Any]) -> str | None:
    """How many images were measured, and how many were left out or have a class."""
    count = data.get("images")
    if count is None:
        return None
    said = f"{count:,} image{'' if count == 1 else 's'}"
    # The reasons also count masks that were left out, whose images were measured.
    left_out = (data.get("listed") or count) - count
    more = [f"{left_out:,} left out"] if left_out else []
    if data.get("labelled"):
        more.append(f"{data['labelled']:,} with a class")
    return said + (f" ({', '.join(more)})" if more else "")


def _left_out(reason: str, names: Any) -> str:
    """How many were left out for a reason, and the first names."""
    listed = [] if isinstance(names, int) else [*map(str, names)]
    more = len(listed) - CLASSES
    first = ", ".join(listed[:CLASSES]) + (f" and {more} more" if more > 0 else "")
    return f"{len(listed) or names:,} {reason}" + (f" ({first})" if first else "")


def _legend(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """The name, colours on a light and on a dark page, and SVG dashes of the line of each model."""
    from matplotlib.colors import to_hex

    from .plots import DARK, styles

    dashes = {"-": "none", "--": "6 3", "-.": "7 2 2 2", ":": "2 2.5"}
    for model, style in zip(models, styles(models), strict=True):
        colour = to_hex(style["color"])
        dash = dashes.get(style["linestyle"], "none")
        yield model["name"], colour, DARK.get(colour, colour), dash


def _panel(document: Document, column: Column) -> dict[str, str]:
    """The plot of a metric over depth, its heading and its caption."""
    from .plots import grid, over_depth

    figure, [axes] = grid(1)
    over_depth(axes, document["models"], column._replace(title=""), document.get("marked") or [])
    size = probe_size(document) if column.name in PROBES else ""
    formula = column.formula
    if column.name in PROBES and document.get("unit"):
        formula = formula.replace("test images", f"test {document['unit']}")
    tested, few, rest = size.partition(" Too few")
    return {
        "title": column.title + column.arrow,
        "source": _source(figure),
        "alt": f"{column.title} over depth. "
        + " ".join(_course(model, column) for model in document["models"]),
        "start": f"{_upper(column.direction)}. {tested}",
        "few": (few + rest).strip(),
        "end": f"{_upper(formula)}.",
    }


def _options(text: str) -> Any:
    """A text as HTML, escaped, in which no line breaks within an option such as --seeds."""
    from markupsafe import Markup, escape

    marked = re.sub(r"(?<!\S)--[a-z-]+", r"<code>\g<0></code>", str(escape(text)))
    return Markup(marked)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _curves(curves: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    from .plots import grid, steps

    for label in dict.fromkeys(curve["label"] for curve in curves):
        figure, [axes] = grid(1)
        steps(axes, [curve for curve in curves if curve["label"] == label])
        yield {
            "title": label,
            "source": _source(figure),
            "alt": f"{label} over training steps.",
            "start": "",
            "few": "",
            "end": "",
        }


def _map_image(heat_map: Mapping[str, Any]) -> str:
    from .plots import heat_maps

    return _source(heat_maps(heat_map))


def _source(figure: Any) -> str:
    """The src of an <img>. As a separate image, an SVG can neither run a script nor share ids with
    another one."""
    from .plots import svg

    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure).encode()).decode()


def _table(runs: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """The names of the columns that have a value, and their cells line by line, without the
    notes."""
    lines = [
        ({"run": number} if len(runs) > 1 else {}) | dict(row)
        for number, run in enumerate(runs)
        for row in run
    ]
    names = dict.fromkeys(name for line in lines for name in line if name != "notes")
    columns = [name for name in names if any(line.get(name) is not None for line in lines)]
    return columns, [[_cell(line.get(name)) for name in columns] for line in lines]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(_joined(value))


def _joined(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _notes(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The notes of the models and of their rows. A note of several rows comes once, with their
    layers."""
    for model in models:
        for note in model.get("notes") or []:
            yield f"{model['name']}: {note}"
        layers: dict[str, set[int]] = {}
        for run in model["runs"]:
            for row in run:
                if row.get("notes"):
                    layers.setdefault(row["notes"], set()).add(row["layer"])
        for note, numbers in layers.items():
            yield f"{model['name']}, {ranges(sorted(numbers))}: {note}"


def _facts(document: Document, data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The data, the device, the versions and so on, as term and description, as far as they are
    known."""
    classes = data.get("classes") or []
    more = f" and {len(classes) - CLASSES} more" if len(classes) > CLASSES else ""
    facts = {
        "Images": data.get("images"),
        "Images listed": data.get("listed"),
        "Left out": "; ".join(
            _left_out(reason, names) for reason, names in (data.get("left_out") or {}).items()
        ),
        "Folder": data.get("folder"),
        "Labelled images": data.get("labelled"),
        f"Classes ({len(classes)})": ", ".join(map(str, classes[:CLASSES])) + more,
        "Masks": data.get("masks"),
        "Prompt": data.get("prompt"),
        "Device": document.get("device"),
        "Versions": ", ".join(
            f"{name} {version}" for name, version in (document.get("versions") or {}).items()
        ),
        "Date": document.get("date"),
        "Command": document.get("command"),
    }
    for term, value in facts.items():
        if value not in (None, ""):
            yield term, str(value)
