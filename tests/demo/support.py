"""A demo of a second, and what it prints."""

import io
import json
from contextlib import contextmanager

from rich.console import Console

from pre_kernels.demo.settings import Settings
from verify import ROOT

TINY = Settings(
    seeds=2,
    width=16,
    layers=2,
    vision_steps=3,
    text_steps=3,
    align_steps=2,
    tune_steps=3,
    batch=4,
    tune_batch=4,
    text_bytes=5000,
    train_scenes=12,
    test_scenes=20,
    readout_steps=3,
)


@contextmanager
def no_bar(stage, name, steps):
    yield lambda loss: None


def screen(width=80, **options):
    """Return a console that keeps what it prints in its `file`."""
    return Console(file=io.StringIO(), width=width, **options)


def committed(kind="demo"):
    """Return the measurements of one of the demos in bench/results."""
    return json.loads((ROOT / "bench" / "results" / f"{kind}.json").read_text())
