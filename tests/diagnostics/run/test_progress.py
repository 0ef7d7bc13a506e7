"""The progress of `pre-kernels diagnose` on a terminal and without one, and its estimate."""

import io
import re

import pytest

pytest.importorskip("rich")

from rich.console import Console

from pre_kernels.diagnostics.run import progress

NAME = "with/a-model-of-a-name-that-is-long/checkpoint-5000"


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def steps(meter, clock, model, kind, total, seconds, done=0):
    with meter.stage(model, kind, total, done) as step:
        for _ in range(total - done):
            clock[0] += seconds
            step()


def test_lines_without_a_terminal(clock):
    text = io.StringIO()
    meter = progress.Meter(Console(file=text, width=60, highlight=False), {"a": 40, "b": 40})
    steps(meter, clock, "a", "images", 40, 2.0, done=10)
    steps(meter, clock, "a", "layers", 4, 10.0)
    assert text.getvalue().splitlines() == [
        "a: measuring 30 images",
        # 15 images of a and 40 of b, 2 s each. The time of layers is not known yet.
        "a: 25 of 40 images, about 2 min left",
        "a: 40 of 40 images, about 1 min left",
        "a: computing the metrics of 4 layers",
        # A layer of a and 4 of b, 10 s each.
        "a: 3 of 4 layers, about 2 min left",
    ]


def test_the_estimate_knows_the_layers_of_the_models_to_come(clock):
    meter = progress.Meter(Console(file=io.StringIO()), {"a": 10, "b": 10})
    assert meter.estimate() == ""
    steps(meter, clock, "a", "images", 10, 3.0)
    assert meter.estimate() == "about 30 s left"
    steps(meter, clock, "a", "layers", 5, 6.0)
    assert meter.estimate() == "about 1 min left"
    steps(meter, clock, "b", "images", 10, 3.0)
    assert meter.estimate() == "about 30 s left"
    steps(meter, clock, "b", "layers", 5, 6.0)
    assert meter.estimate() == ""
    assert progress.in_words(9000) == "2.5 h"


@pytest.mark.parametrize("width", [60, 80])
def test_a_bar_fits_the_terminal(clock, width):
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, no_color=True)
    steps(progress.Meter(console, {NAME: 12000}), clock, NAME, "images", 12000, 3.0, done=11990)
    shown = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", text.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown)]
    assert max(map(len, lines)) <= width
    assert any(re.match(r"….*point-5000: 12000 of 12000 images", line) for line in lines)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    text = io.StringIO()
    console = Console(file=text, width=60, force_terminal=True, no_color=True)
    steps(progress.Meter(console, {"a": 3}), clock, "a", "images", 3, 20.0)
    assert text.getvalue().splitlines() == [
        "a: measuring 3 images",
        "a: 2 of 3 images, about 20 s left",
    ]
