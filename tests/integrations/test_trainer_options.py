"""PRe with the Trainer's own options: accumulation, evaluation, a loss function, freezing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pre_kernels.integrations import apply_pre, patch_trainer

from .support.by_hand import copy_of, pre_loss, watch
from .support.tiny.models import batch, build
from .support.tiny.training import EQUAL, UNEQUAL_IMAGES, Recorder, Samples, make, own_loss


def test_the_last_accumulation_is_incomplete(tmp_path: Path) -> None:
    """Five samples, two per batch and two batches per step: the second step has only one sample."""
    model = build("llava")
    recorder = Recorder()
    handle = apply_pre(model)
    head = copy_of(handle.head)
    samples = [*UNEQUAL_IMAGES, [("text", 2), ("image", 8, 8), ("text", 4)]]
    with patch_trainer():
        make(
            tmp_path, model, samples=samples, size=2, callbacks=[recorder], max_steps=-1,
            num_train_epochs=1, learning_rate=0.0, include_num_input_tokens_seen=True,
            torch_empty_cache_steps=1,
        ).train()  # fmt: skip
    assert len(recorder.steps) == 2
    plain = build("llava")
    seen = watch(plain, "llava")
    for step, part in zip(recorder.steps, ([0, 1, 2, 3], [4]), strict=True):
        data = [batch("llava", [samples[i]], seed=i) for i in part]
        tokens = sum(int(d.visual.sum()) for d in data)
        for parameter in head.values():
            parameter.grad = None
        for each in data:
            plain(**each.inputs)
            (0.5 / tokens * pre_loss(seen, each, [2], head, reduction="sum")).backward()
        for name, parameter in head.items():
            torch.testing.assert_close(
                step[f"pre_head.{name}"], parameter.grad, rtol=2e-4, atol=1e-7
            )


def test_evaluation_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    heads, logs = [], []
    for more in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Samples(EQUAL)}):
        model = build("llava")
        handle = apply_pre(model)
        with patch_trainer():
            trainer = make(tmp_path, model, max_steps=3, **more)
            trainer.train()
        heads.append(handle.head.w1.detach().clone())
        logs.append([e["pre_loss"] for e in trainer.state.log_history if "pre_loss" in e])
    assert torch.equal(*heads)
    assert logs[0] == logs[1]


def test_compute_loss_func(tmp_path: Path) -> None:
    """It gets the labels instead of the model."""
    grads = []
    for func in (None, own_loss):
        model = build("llava")
        recorder = Recorder()
        apply_pre(model)
        with patch_trainer():
            make(
                tmp_path,
                model,
                samples=UNEQUAL_IMAGES,
                callbacks=[recorder],
                compute_loss_func=func,
            ).train()
        grads.append(recorder.steps[0])
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-3, atol=2e-6)


def test_freezing_and_unfreezing_in_the_middle(tmp_path: Path) -> None:
    class Toggles(TrainerCallback):
        def __init__(self) -> None:
            self.moved: list[tuple[bool, bool]] = []

        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            head, rest = [(True, True), (False, True), (True, False), (True, True)][
                state.global_step
            ]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(head if name.startswith("pre_head") else rest)
            self.before = (
                model.pre_head.w1.detach().clone(),
                model.lm_head.weight.detach().clone(),
            )

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            now = (model.pre_head.w1, model.lm_head.weight)
            self.moved.append(
                tuple(not torch.equal(a, b) for a, b in zip(self.before, now, strict=True))
            )

    model = build("llava")
    toggles = Toggles()
    apply_pre(model)
    with patch_trainer():
        make(tmp_path, model, max_steps=4, callbacks=[toggles]).train()
    assert toggles.moved == [(True, True), (False, True), (True, False), (True, True)]
