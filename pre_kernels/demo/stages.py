"""The stages of a seed, and how long their steps take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

from .settings import Settings

# This function moves a progress bar on and takes the loss of the step.
Advance = Callable[[float], None]


class Stage(NamedTuple):
    """A stage: its name, and the seconds of a step on the machine of bench/results/demo.json.

    Only the ratios of the seconds count once some steps have been timed.
    """

    name: str
    seconds: float


# A Bar makes a bar on the screen for a stage, from the name of the run and a number of steps, and
# gives the function that moves it on.
Bar = Callable[[Stage, str, int], AbstractContextManager[Advance]]

SEE = Stage("vision tower on digits", 0.04)
READ = Stage("LLM on text", 0.135)
ALIGN = Stage("alignment", 0.067)
TUNE = Stage("instruction tuning", 0.067)
# A step is a layer, whose probe is fitted.
MEASURE = Stage("measuring", 0.56)


def of_a_seed(settings: Settings) -> Iterator[tuple[Stage, int]]:
    """Yield the stages of a seed with their numbers of steps."""
    layers = settings.layers + 1
    yield SEE, settings.vision_steps
    yield READ, settings.text_steps
    yield MEASURE, layers
    for _ in ("without", "with"):
        yield ALIGN, settings.align_steps
        yield TUNE, settings.tune_steps
        yield MEASURE, layers


def seconds(settings: Settings) -> float:
    """Return the expected seconds of a seed."""
    return sum(stage.seconds * steps for stage, steps in of_a_seed(settings))
