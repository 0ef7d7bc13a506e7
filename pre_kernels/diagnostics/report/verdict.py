"""The verdict of a report: what its numbers say about the visual tokens, in a few sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from statistics import mean
from typing import Any, NamedTuple

from .columns import COLUMNS, MAIN, PROBES, Column, by_layer, measured_columns
from .statistics import FEWEST_SEEDS, interval, standard_error

Document = Mapping[str, Any]
Model = Mapping[str, Any]
Values = dict[int, list[float]]
# For each measure that can show a loss: who loses what, and its value where nothing is left, which
# for a probe is chance.
LOSSES = {
    "linear_probe": ("its visual tokens lose", "information", 0.0),
    "contrast": ("its patches lose", "contrast between objects", 1.0),
    "spatial_contrast": ("its patches lose", "spatial structure", 1.0),
}
# What each of them says, for readers who do not know it.
READING = {
    "linear_probe": "The linear probe is the share of test {unit} whose class can be read from the "
    "visual tokens of a layer.",
    "contrast": "The semantic contrast ratio says how much more alike two patches of one object "
    "are than patches of two objects; at 1 they are equally alike.",
    "spatial_contrast": "Spatial contrast says how much more alike neighbouring patches are than "
    "distant ones; at 1 they are equally alike.",
}
# A fall of less than this share of what is above that value is called so.
AMOUNTS = ((0.05, "little"), (0.25, "some"), (math.inf, "much"))
# A change of this share of the first value (at least of 1) is the smallest that is called one.
SMALLEST = 0.02
# The same where the noise is not known.
SMALLEST_UNKNOWN = 0.05
# An interval wider than ± this leaves the answer of a probe open.
OPEN = 0.1
# Most of a fall is this share of it.
MOST = 2 / 3
# A probe is tested on few images below this number: one accuracy is then off by up to 0.1.
FEW_TESTED = 100
# Half a 95 % interval is this many standard errors.
NORMAL = 1.96


def verdict(document: Document) -> list[str]:
    """Whether each model loses what its visual tokens tell, in which layers, which of two models
    keeps more, and how sure that is.

    A change counts if it exceeds `SMALLEST` and the noise, and has one sign in all runs. With three
    or more runs of a model, noise is half the 95 % interval over the runs (Student's t). With fewer
    it is that of the accuracy of a probe on as many test images (binomial, as if two layers or
    models were tested on different images, which is the wider interval). For other measures of one
    or two runs it is not known, and `SMALLEST_UNKNOWN` takes its place.

    Args:
        document: as for `page.html`. With a "warning" there is no verdict.

    Returns:
        Sentences without marks. The first part, up to ": ", is the name of a model where the
        sentence is about one.
    """
    if document.get("warning"):
        return []
    models = document["models"]
    chosen = _chosen(models)
    if not chosen:
        return [_instead(models), _wanted(models)]
    unit = _unit(document)
    column = COLUMNS[chosen[0]]
    said = [_course(model, column, unit) for model in models]
    for before, after in pairwise(models):
        said += _comparison(before, after, [COLUMNS[name] for name in chosen])
    said.append(_certainty(models, column, unit))
    if chosen == ["spatial_contrast"]:
        said.append(_wanted(models))
    return said


def about(document: Document) -> str:
    """What the report is about: the document's own words, or how to read the measures of the
    verdict."""
    if document.get("about"):
        return str(document["about"])
    chosen = _chosen(document["models"])
    said = [READING[name].format(unit=_unit(document)) for name in chosen]
    return " ".join([*said, "Layer 0 is the input of the LLM."] if said else [])


def _chosen(models: Sequence[Model]) -> list[str]:
    """The measures of `LOSSES` that were measured. Spatial contrast counts only without masks."""
    measured = {column.name for column in measured_columns(models)}
    return [
        name
        for name in LOSSES
        if name in measured and not (name == "spatial_contrast" and "contrast" in measured)
    ]


def _unit(document: Document) -> str:
    """What a probe classifies."""
    return document.get("unit") or "images"


class Tested(NamedTuple):
    """The test part of a model's probes: its size over all runs, and the accuracy of a guess."""

    size: int
    chance: float

    @property
    def error(self) -> float:
        """The largest standard error that an accuracy can have with this many cases."""
        return standard_error(0.5, self.size)


def probe_part(model: Model) -> Tested | None:
    """The test part of a model's probes. None: it has no probe, or does not say."""
    sizes = by_layer(model["runs"], "probe_test")
    chances = by_layer(model["runs"], "probe_chance")
    if not sizes or not chances:
        return None
    layer = next(iter(sizes))
    return Tested(int(sum(sizes[layer])), mean(chances[layer]))


def probe_size(document: Document) -> str:
    """On what the probes were tested and what that is good for, in words. Empty: not known."""
    found = {part for model in document["models"] if (part := probe_part(model))}
    if not found:
        return ""
    least = min(found)
    unit = _unit(document)
    text = (
        f"Tested on {least.size:,} {unit}: standard error up to {least.error:.2f}, "
        f"chance {least.chance:.2f}"
    )
    if least.size >= FEW_TESTED:
        return f"{text}."
    return (
        f"{text}. Too few to mean much: differences up to {_margin((0.5, 0.5), least):.2f} can be "
        f"noise. Use more {unit} with a class."
    )


def _course(model: Model, column: Column, unit: str) -> str:
    """Whether a measure falls from the first layer to its lowest one, and where."""
    values = by_layer(model["runs"], column.name)
    name = model["name"]
    if not values:
        return f"{name}: {column.title} was not measured."
    means = {layer: mean(found) for layer, found in values.items()}
    first, last = min(means), max(means)
    lowest = min(means, key=lambda layer: means[layer])
    what = _lower(column.title)
    start = f"{means[first]:.2f} at layer {first}"
    if first == last:
        return f"{name}: the {what} is {start}, the only layer measured."
    part = probe_part(model) if column.name in PROBES else None
    if part and means[first] - part.chance <= NORMAL * standard_error(means[first], part.size):
        return (
            f"{name}: nothing can be told. The {what} is at chance from the start ({start}, "
            f"chance {part.chance:.2f}): more {unit}, or classes that differ more, are needed."
        )
    who, lost, floor = LOSSES[column.name]
    noise = _noise(values[first], values[lowest], part)
    if not _clear(values[lowest], values[first], noise):
        said = (
            f"no loss of {lost} is seen"
            if (noise or 0) < OPEN
            else "a loss cannot be told from noise"
        )
        end = (
            f"never lower, {means[last]:.2f} at layer {last}"
            if lowest == first
            else f"{means[lowest]:.2f} at layer {lowest}, its lowest"
        )
        return f"{name}: {said}. The {what} is {start} and {end}{_within(noise, part, unit)}."
    fall = means[first] - means[lowest]
    above = means[first] - (part.chance if part else floor)
    amount = next(word for share, word in AMOUNTS if fall < share * above or share == math.inf)
    a, b = steepest(means, lowest)
    where = "" if (a, b) == (first, lowest) else f", most of it between layers {a} and {b}"
    again = (
        f"; at the last layer, {last}, it is {means[last]:.2f}"
        if _clear(values[lowest], values[last], noise)
        else ""
    )
    return (
        f"{name}: {who} {amount} {lost}. The {what} falls from {start} to {means[lowest]:.2f} at "
        f"layer {lowest}{where}{again}."
    )


def _clear(low: list[float], high: list[float], noise: float | None) -> bool:
    """Whether values of some runs are above others by more than the noise."""
    change = mean(high) - mean(low)
    signs = len(low) != len(high) or all(b > a for a, b in zip(low, high, strict=True))
    least = SMALLEST_UNKNOWN if noise is None else SMALLEST
    return signs and change > max(noise or 0, least * max(1, abs(mean(high))))


def steepest(means: Mapping[int, float], lowest: int) -> tuple[int, int]:
    """The shortest span of layers, up to the lowest one, that has two thirds of the fall from the
    first layer to the lowest. Of spans of one length, that with the largest fall."""
    layers = [layer for layer in means if layer <= lowest]
    fall = means[layers[0]] - means[lowest]
    spans = [
        (b - a, means[layers[b]] - means[layers[a]], layers[a], layers[b])
        for a, b in combinations(range(len(layers)), 2)
        if means[layers[a]] - means[layers[b]] >= MOST * fall
    ]
    return min(spans)[2:]


def _comparison(before: Model, after: Model, columns: Sequence[Column]) -> list[str]:
    """Which of two models keeps more in its deep half. A further measure is named if it differs."""
    said: list[str] = []
    signs: list[int] = []
    for column in columns:
        runs = [deep(model, column) for model in (before, after)]
        if not all(runs):
            continue
        old, new = ([mean(run.values()) for run in found] for found in runs)
        parts = [part for model in (before, after) if (part := probe_part(model))]
        part = min(parts) if len(parts) == 2 and column.name in PROBES else None
        noise = _noise(old, new, part)
        sign = _clear(old, new, noise) - _clear(new, old, noise)
        signs.append(sign)
        over = " and ".join(dict.fromkeys(ranges([*found[0]]) for found in runs))
        margin = "" if noise is None else f" ± {noise:.2f}"
        amount = f"over {over} ({mean(new) - mean(old):+.2f}{margin})"
        what = _lower(column.title)
        values = f"{mean(new):.2f} instead of {mean(old):.2f} {amount}"
        if len(signs) > 1:
            but = "Also" if sign == signs[0] else "But"
            which = "better" if sign > 0 else "worse"
            said += [f"{but} the {what} of “{after['name']}” is {which}: {values}."] if sign else []
        elif sign:
            more = "more" if sign > 0 else "less"
            said.append(
                f"“{after['name']}” keeps {more} than “{before['name']}”: its {what} is {values}."
            )
        else:
            said.append(
                f"No difference is clear between “{before['name']}” and “{after['name']}”: the "
                f"{what} is {mean(old):.2f} and {mean(new):.2f} {amount}."
            )
    return said


def _certainty(models: Sequence[Model], column: Column, unit: str) -> str:
    """How sure the sentences before are."""
    least = min(len(model["runs"]) for model in models)
    if least >= FEWEST_SEEDS:
        return f"How sure: {least} runs of each model; ± is half a 95 % interval over them."
    parts = (
        [part for model in models if (part := probe_part(model))] if column.name in PROBES else []
    )
    if parts:
        part = min(parts)
        few = f", too few ({FEW_TESTED} or more are needed)" if part.size < FEW_TESTED else ""
        said = (
            f"{part.size:,} test {unit}{few}: an accuracy is known to ± {NORMAL * part.error:.2f}"
        )
    else:
        said = "the noise of these numbers was not measured"
    if len(models) > 1:
        runs = "One run" if least == 1 else f"{least} runs"
        said += f". {runs} of each cannot show what other seeds give; {FEWEST_SEEDS} or more can"
    return f"How sure: {said}."


def _noise(before: list[float], after: list[float], part: Tested | None) -> float | None:
    """Half the 95 % interval of the change between two layers or models."""
    if len(before) == len(after) >= FEWEST_SEEDS:
        low, high = interval([b - a for a, b in zip(before, after, strict=True)])
        return (high - low) / 2
    return None if part is None else _margin((mean(before), mean(after)), part)


def _margin(shares: tuple[float, float], part: Tested) -> float:
    return NORMAL * math.hypot(*(standard_error(share, part.size) for share in shares))


def _within(noise: float | None, part: Tested | None, unit: str) -> str:
    if noise is None:
        return ""
    of = f" of {part.size:,} test {unit}" if part else ""
    return f"; differences up to {noise:.2f} are within the noise{of}"


def _instead(models: Sequence[Model]) -> str:
    """What was measured where nothing shows whether information is lost."""
    columns = measured_columns(models)
    if not columns:
        return "Whether the models lose visual information is not known: nothing was measured."
    column = next((COLUMNS[name] for name in MAIN if COLUMNS[name] in columns), columns[0])
    said = []
    for model in models:
        values = by_layer(model["runs"], column.name)
        ends = [
            f"{mean(values[layer]):.2f} at layer {layer}"
            for layer in dict.fromkeys((min(values, default=0), max(values, default=0)))
            if layer in values
        ]
        said.append(f"{model['name']} {' and '.join(ends) or 'not measured'}")
    return (
        "Whether visual information is lost cannot be told from these measures. Measured instead, "
        f"the {_lower(column.title)}: {'; '.join(said)}."
    )


def _wanted(models: Sequence[Model]) -> str:
    """What would have to be given to measure what is missing."""
    measured = measured_columns(models)
    needs = [
        COLUMNS[name].needs.partition(", ")
        for name in ("linear_probe", "contrast")
        if COLUMNS[name] not in measured
    ]
    return f"To tell more: give {' or '.join(f'{name} ({what})' for name, _, what in needs)}."


def deep(model: Model, column: Column) -> list[dict[int, float]]:
    """For each run, its values at the layers from L/2 on that all runs have. Empty if there are no
    such layers."""
    by_number = by_layer(model["runs"], column.name)
    depth = model.get("depth") or max(by_number, default=0)
    runs = range(len(model["runs"]))
    layers = [
        layer
        for layer, values in by_number.items()
        if layer >= depth // 2 and len(values) == len(runs)
    ]
    return [{layer: by_number[layer][run] for layer in layers} for run in runs] if layers else []


def ranges(layers: Sequence[int]) -> str:
    """[4, 5, 6] as "layers 4 to 6", [4, 6] as "layers 4, 6"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) == layers[-1] - layers[0] + 1:
        return f"layers {layers[0]} to {layers[-1]}"
    return "layers " + ", ".join(map(str, layers))


def _lower(title: str) -> str:
    return title[0].lower() + title[1:]
