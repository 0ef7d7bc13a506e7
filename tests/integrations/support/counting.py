"""Trainings with unequal micro-batches, and the gradients that their steps should have, by hand."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from pre_kernels.integrations import apply_pre, patch_trainer

from .by_hand import copy_of
from .tiny.models import batch, build
from .tiny.training import UNEQUAL_IMAGES, Recorder, Samples, arguments, by_hand, collate
from .warned import pre_warnings

TOKENS = [int(batch("llava", [sample]).visual.sum()) for sample in UNEQUAL_IMAGES]
METHODS = ["training_step", "get_batch_samples", "_inner_training_loop", "train", "log"]


def run(
    trainer_class: type,
    folder: Path,
    steps: int = 3,
    accumulation: int = 2,
    prepare: Any = None,
    collator: Any = None,
    samples: Any = UNEQUAL_IMAGES,
    logged: bool = True,
    **more: Any,
) -> tuple[list[dict[str, torch.Tensor]], Any, list[str]]:
    """Train, without changing parameters: (the gradients of each step, the handle, PRe's
    warnings)."""
    model = build("llava")
    recorder = Recorder()
    handle = apply_pre(model, mask_fn=more.pop("mask_fn", None))
    before = copy_of(handle.head)
    with warnings.catch_warnings(record=True) as caught, patch_trainer():
        warnings.simplefilter("always")
        trainer = trainer_class(
            model=model,
            args=arguments(
                folder, accumulation, 4 // accumulation, max_steps=steps, learning_rate=0.0, **more
            ),
            train_dataset=Samples(samples),
            data_collator=collator or collate("llava", samples),
            callbacks=[recorder],
        )
        if prepare is not None:
            prepare(trainer)
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in handle.head.named_parameters())
    assert not any(name.startswith("_pre") or name in METHODS for name in vars(trainer))
    assert "pre_loss" in trainer.state.log_history[0] or not logged
    return recorder.steps, handle, pre_warnings(caught)


def of_the_step(
    handle: Any, samples: Any = UNEQUAL_IMAGES, times: float = 1.0
) -> dict[str, torch.Tensor]:
    """λ · ∇(Σℓ ÷ the number of visual tokens of the whole step)."""
    tokens = sum(TOKENS)
    return by_hand("llava", samples, handle, [times / tokens] * 4, "sum")


def own_means(handle: Any, micro_batches: int = 2, times: float = 1.0) -> dict[str, torch.Tensor]:
    """The mean of the micro-batches' own means, where each micro-batch has two samples."""
    size = 4 // micro_batches
    counts = [sum(TOKENS[i - i % size :][:size]) for i in range(4)]
    return by_hand(
        "llava",
        UNEQUAL_IMAGES,
        handle,
        [times / (c * micro_batches) if c else 0 for c in counts],
        "sum",
    )


def only(said: list[str], start: str) -> None:
    assert len(said) == 1, said
    assert re.match(f"PRe: {start}", said[0]), said
