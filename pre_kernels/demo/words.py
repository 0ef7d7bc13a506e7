"""What the demo's results say, in sentences. Every number in them comes from the runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from pre_kernels.screen import plural

from .settings import Settings

Results = dict[str, Any]
ABOUT = (
    "PRe (Predictive Regularization) adds a loss, L_PRe, to the training of a vision-language "
    "model: a small head, later removed, predicts the image tokens that enter the LLM from those "
    "in its middle, so these keep what the image shows."
)
SMOKE = (
    "Smoke test (--quick): the trainings are too short to show an effect. The numbers only show "
    "that everything runs, and say nothing about PRe."
)
# An accuracy that falls by less is said to be kept.
KEPT = 0.02
# So many standard errors of a difference between two accuracies are within the noise.
NOISE = 2.0
# Other measures of which higher is better: their keys, names and digits after the point.
OTHERS = (("contrast", "contrast ratio", 2), ("effective_dimension", "effective dimension", 1))
# Fewer seeds have no useful interval.
SEVERAL = 3


def smoke_test(settings: dict[str, Any]) -> bool:
    """Return whether the trainings were shorter than the demo's own."""
    return bool(settings["tune_steps"] < Settings.tune_steps)


def verdict(results: Results) -> list[str]:
    """Say what PRe did to the image tokens and to the task, for people who have not read the paper.
    A smoke test has no verdict."""
    if smoke_test(results["settings"]):
        return []
    return [*_tokens(results), _task(results), *_others(results), *_seeds(results)]


def agreed(changes: Sequence[float]) -> int:
    """Return 1 if all changes are above 0, -1 if all are below, else 0."""
    return int(all(c > 0 for c in changes)) - int(all(c < 0 for c in changes))


def better(changes: Sequence[float], sign: int = 1) -> str:
    """Say in how many seeds a value is better. `sign` is -1 where lower is better."""
    count = sum(sign * change > 0 for change in changes)
    return f"{count} of {plural(len(changes), 'seed')}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _tokens(results: Results) -> list[str]:
    ends = {
        arm: [(run[arm]["probe"][0], run[arm]["probe"][-1]) for run in results["seeds"]]
        for arm in ("without", "with")
    }
    falls = {arm: [first - last for first, last in values] for arm, values in ends.items()}
    shown = {
        arm: [percent(mean(value)) for value in zip(*values, strict=True)]
        for arm, values in ends.items()
    }
    lost = mean(falls["without"]) > KEPT
    first, last = shown["without"]
    begin = "loses part" if lost else "keeps nearly all"
    less = [a - b for a, b in zip(falls["without"], falls["with"], strict=True)]
    close = abs(mean(less)) < KEPT
    sign = 0 if close else agreed(less)
    said = {
        1: "With PRe it keeps more",
        -1: "With PRe it keeps less",
        0: "With PRe there is no clear difference",
    }[sign]
    return [
        f"Without PRe the LLM {begin} of what its image tokens show: a linear classifier (probe) "
        f"reads a digit from them with {first} accuracy at the input, {last} after the last layer.",
        f"{said}: {shown['with'][0]} and {shown['with'][1]}.",
    ]


def _task(results: Results) -> str:
    values = [[run[arm]["accuracy"] for run in results["seeds"]] for arm in ("without", "with")]
    without, with_ = map(mean, values)
    count = len(results["seeds"]) * results["settings"]["test_scenes"]
    error = sum(share * (1 - share) / count for share in (without, with_)) ** 0.5
    change = with_ - without
    close = abs(change) <= NOISE * error
    how = "equally well" if close else f"{'better' if change > 0 else 'worse'} with PRe"
    return (
        f"The task, odd or even, is learned {how}: {percent(without)} right answers without, "
        f"{percent(with_)} with it."
    )


def _others(results: Results) -> list[str]:
    """Say so if another measure tells another story."""
    layer = results["settings"]["layer"]
    said = []
    for key, name, digits in OTHERS:
        if key not in results["seeds"][0]["with"]:
            continue
        deep = [
            [mean(run[arm][key][layer:]) for run in results["seeds"]] for arm in ("without", "with")
        ]
        if agreed([b - a for a, b in zip(*deep, strict=True)]) < 0:
            without, with_ = (f"{mean(values):.{digits}f}" for values in deep)
            said.append(f"{name} {with_}, without {without}")
    return [f"Worse with PRe, unlike in the paper: {'; '.join(said)}."] if said else []


def _seeds(results: Results) -> list[str]:
    count = len(results["seeds"])
    if count >= SEVERAL:
        return []
    number = "One seed" if count == 1 else "Two seeds"
    return [f"{number} cannot rule out chance: use --seeds 5."]
