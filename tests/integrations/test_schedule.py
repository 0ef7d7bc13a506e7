"""λ during the training: warmup, the cosine, and progress that is restored from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pre_kernels.integrations import apply_pre, patch_trainer

from .support.tiny.models import batch, build
from .support.tiny.training import make


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {0.0: 1, 0.5: 1, 1.0: 1}),
        ({"warmup": 0.2}, {0.0: 0, 0.1: 0.5, 0.2: 1, 1.0: 1}),
        ({"schedule": "cosine"}, {0.0: 1, 0.25: 0.5 + 0.25 * math.sqrt(2), 0.5: 0.5, 1.0: 0}),
        ({"schedule": "cosine", "warmup": 0.5}, {0.25: 0.5, 0.5: 1, 0.75: 0.5, 1.0: 0}),
        ({"schedule": "cosine", "warmup": 1}, {0.25: 0.25, 1.0: 1}),
    ],
)
def test_schedule(options: dict[str, Any], wanted: dict[float, float]) -> None:
    model = build("llava")
    data = batch("llava")
    base = float(model(**data.inputs).loss.detach())
    handle = apply_pre(model, weight=0.8, **options)
    calls: list[int] = []
    handle.head.register_forward_hook(lambda *_: calls.append(1))
    for progress, factor in wanted.items():
        handle.progress = progress
        assert handle.scheduled_weight == pytest.approx(0.8 * factor, abs=1e-12)
        calls.clear()
        loss = float(model(**data.inputs).loss.detach())
        metrics = handle.metrics()
        assert ("pre_weight" in metrics) == bool(options)
        assert len(calls) == (factor > 1e-12)
        added = 0.8 * factor * metrics["pre_loss"] if calls else 0
        assert loss - base == pytest.approx(added, abs=2e-6)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_wrong_progress(value: float) -> None:
    handle = apply_pre(build("llava"))
    with pytest.raises(ValueError, match=r"progress: got"):
        handle.progress = value


def test_the_trainer_moves_along_the_schedule(tmp_path: Path) -> None:
    """Every step has a λ above 0, because DDP needs the head in each graph, and a resumed training
    has the same values."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    logs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = build("llava")
        handle = apply_pre(model, schedule="cosine", warmup=0.4)
        with patch_trainer():
            trainer = make(tmp_path, model, **saving)
            trainer.train(resume_from_checkpoint=resume)
        logs.append([e["pre_weight"] for e in trainer.state.log_history if "pre_weight" in e])
    wanted = [
        0.125,
        0.375,
        *(0.25 * (1 + math.cos(math.pi * (s - 0.4) / 0.6)) for s in (0.5, 0.7, 0.9)),
    ]
    assert logs[0] == logs[1] == pytest.approx(wanted)
    assert handle.progress == pytest.approx(0.9)
