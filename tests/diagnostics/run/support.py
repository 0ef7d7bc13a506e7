"""Helpers of these tests: a tiny model, the command, its results and its interruption."""

import json

import pytest
import torch
from PIL import Image

from pre_kernels.cli import main
from pre_kernels.demo.model import build
from pre_kernels.demo.settings import Settings
from pre_kernels.diagnostics import measure
from pre_kernels.diagnostics.run import run

# How many scenes of each digit there are.
EACH = 2


def tiny(seed=0):
    torch.manual_seed(seed)
    model = build(Settings(width=16, layers=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def diagnose(*arguments):
    return main(["diagnose", *map(str, arguments)])


def document(out):
    return json.loads((out / "diagnosis.json").read_text(encoding="utf-8"))


def close(row, wanted):
    return row == {
        k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in wanted.items()
    }


def images(folder, count, kind="L"):
    """A folder of plain images without classes."""
    folder.mkdir()
    for index in range(count):
        Image.new(kind, (24, 24), 10 * index).save(folder / f"{index}.png")
    return folder


class Stop(Exception):
    pass


def interrupted(monkeypatch, after, error):
    """Make `run.measure` raise `error` once it has measured `after` images."""
    done = []

    def measured(*args, **kwargs):
        if len(done) == after:
            raise error
        done.append(args)
        return measure(*args, **kwargs)

    monkeypatch.setattr(run, "measure", measured)
    return done
