"""transformers.Trainer: the auxiliary gradient of an optimizer step, with and without
patch_trainer, and logs.

The head's gradient comes only from L_PRe, so it is compared directly. The model's is compared with
that of the whole loss.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer

from pre_kernels.integrations import apply_pre, patch_trainer
from pre_kernels.integrations.counting import Step, counting_of
from pre_kernels.integrations.trainer import _training_step

from .support.by_hand import copy_of
from .support.tiny.models import batch, build
from .support.tiny.training import (
    EQUAL,
    UNEQUAL_IMAGES,
    UNEQUAL_LABELS,
    InOrder,
    Recorder,
    Samples,
    arguments,
    assert_head,
    by_hand,
    collate,
    labels_of,
    one_image,
    train,
)

# The first family is given num_items_in_batch.
both = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])


@both
@pytest.mark.parametrize("patched", [False, True])
def test_accumulation_changes_nothing_where_counts_are_equal(
    family: str, patched: bool, tmp_path: Path
) -> None:
    once, handle, _ = train(family, EQUAL, tmp_path, 1, patched)
    wanted = by_hand(family, EQUAL, handle, [0.25] * 4, "mean")
    assert_head(once, wanted)
    for accumulation in (2, 4):
        several, _, _ = train(family, EQUAL, tmp_path, accumulation, patched)
        assert_head(several, wanted)
        # The labels are equal too, so the model's gradients are as well.
        for name, gradient in once.items():
            torch.testing.assert_close(several[name], gradient, rtol=1e-3, atol=1e-6)


@both
def test_without_the_patch_micro_batches_weigh_like_their_loss(family: str, tmp_path: Path) -> None:
    found, handle, trainer = train(family, UNEQUAL_LABELS, tmp_path, 4)
    counts = [labels_of(family, sample, i) for i, sample in enumerate(UNEQUAL_LABELS)]
    shares = [n / sum(counts) for n in counts] if trainer.model_accepts_loss_kwargs else [0.25] * 4
    assert trainer.model_accepts_loss_kwargs is (family == "llava")
    assert_head(found, by_hand(family, UNEQUAL_LABELS, handle, shares, "mean"))


@both
@pytest.mark.parametrize("samples", [UNEQUAL_LABELS, UNEQUAL_IMAGES], ids=["labels", "images"])
@pytest.mark.parametrize("level", ["patch", "image"])
def test_with_the_patch_every_visual_token_weighs_the_same(
    family: str, samples: list[Any], level: str, tmp_path: Path
) -> None:
    tokens = sum(int(batch(family, [s]).visual.sum()) for s in samples)
    count = tokens if level == "patch" else sum(len(batch(family, [s]).lengths) for s in samples)
    once, handle, _ = train(family, samples, tmp_path, 1, patched=True, level=level)
    wanted = by_hand(family, samples, handle, [1 / count] * 4, "sum", level)
    assert_head(once, wanted)
    for accumulation in (2, 4):
        several, _, trainer = train(
            family, samples, tmp_path, accumulation, patched=True, level=level
        )
        assert_head(several, wanted)
    assert "backward" not in vars(trainer.accelerator)


TWO_SIZES = [
    [("text", 2), ("image", 8, 8), ("text", 3), ("image", 8, 16), ("text", 4)],
    [("image", 16, 16), ("text", 4)],
    [("text", 7)],
    [("text", 3), ("image", 8, 8), ("text", 6)],
]


@pytest.mark.parametrize("level", ["patch", "image"])
def test_with_the_patch_every_image_weighs_the_same(level: str, tmp_path: Path) -> None:
    family = "qwen2_5_vl"
    images = 4
    for accumulation in (1, 2, 4):
        found, handle, _ = train(
            family, TWO_SIZES, tmp_path, accumulation, patched=True, level=level, weighting="image"
        )
        wanted = by_hand(family, TWO_SIZES, handle, [1 / images] * 4, "sum", level, "image")
        assert_head(found, wanted)
        assert handle.count(collate(family, TWO_SIZES)([0, 1, 2, 3])) == images


@both
def test_the_patch_adds_to_the_model_exactly_the_auxiliary_gradient(
    family: str, tmp_path: Path
) -> None:
    grads, handle, _ = train(family, UNEQUAL_IMAGES, tmp_path, 4, patched=True)
    model = build(family)
    recorder = Recorder()
    trainer = InOrder(
        model=model,
        args=arguments(tmp_path, 4, 1),
        train_dataset=Samples(UNEQUAL_IMAGES),
        data_collator=collate(family, UNEQUAL_IMAGES),
        callbacks=[recorder],
    )
    trainer.train()
    tokens = sum(int(batch(family, [s]).visual.sum()) for s in UNEQUAL_IMAGES)
    auxiliary = by_hand(family, UNEQUAL_IMAGES, handle, [1 / tokens] * 4, "sum")
    for name, gradient in recorder.steps[0].items():
        wanted = gradient + auxiliary.get(name, 0)
        torch.testing.assert_close(
            grads[name], wanted, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


class OwnBackward(InOrder):
    """A trainer whose accelerator has been patched by someone else."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        backward = self.accelerator.backward
        self.accelerator.backward = lambda loss, **more: backward(3 * loss, **more)
        return super().create_optimizer(*args, **kwargs)


def test_the_patch_keeps_a_patched_accelerator(tmp_path: Path) -> None:
    found, handle, _ = train("llava", EQUAL, tmp_path, 4, patched=True, trainer_class=OwnBackward)
    assert_head(found, by_hand("llava", EQUAL, handle, [3 / 4] * 4, "mean"))


def test_after_training_the_model_adds_its_own_mean_again(tmp_path: Path) -> None:
    _, handle, trainer = train("llava", EQUAL, tmp_path, 2, patched=True)
    inputs = batch("llava").inputs
    whole = trainer.model.train()(**inputs).loss
    handle.enabled = False
    plain = trainer.model(**inputs).loss
    assert float((whole - plain).detach()) == pytest.approx(
        0.5 * handle.metrics()["pre_loss"], abs=1e-5
    )


class OwnLoss(InOrder):
    """A trainer that computes its own loss and ignores `output.loss`, as some do."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        output = model(**inputs)
        flat = output.logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten())
        return (loss, output) if return_outputs else loss


def test_the_patch_reaches_trainers_with_a_loss_of_their_own(tmp_path: Path) -> None:
    found, handle, _ = train(
        "llava", UNEQUAL_IMAGES, tmp_path, 2, patched=True, trainer_class=OwnLoss
    )
    tokens = sum(int(batch("llava", [s]).visual.sum()) for s in UNEQUAL_IMAGES)
    assert_head(found, by_hand("llava", UNEQUAL_IMAGES, handle, [1 / tokens] * 4, "sum"))


def test_the_patch_reaches_trainers_that_take_the_labels(tmp_path: Path) -> None:
    found, handle, _ = train(
        "llava", UNEQUAL_IMAGES, tmp_path, 2, patched=True, label_smoothing_factor=0.1
    )
    tokens = sum(int(batch("llava", [s]).visual.sum()) for s in UNEQUAL_IMAGES)
    assert_head(found, by_hand("llava", UNEQUAL_IMAGES, handle, [1 / tokens] * 4, "sum"))


class Rows(InOrder):
    """Its batches are lists of rows, from which it makes the model's inputs later, like trainers
    that generate."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(self.merge([row["index"] for row in inputs]))


def test_batches_that_are_no_mappings_are_not_counted(tmp_path: Path) -> None:
    grads = []
    for patched in (False, True):
        model = build("llava")
        recorder = Recorder()
        apply_pre(model)
        with patch_trainer() if patched else contextlib.nullcontext():
            trainer = Rows(
                model=model,
                args=arguments(tmp_path, 2, 2, max_steps=2),
                train_dataset=Samples(UNEQUAL_IMAGES),
                data_collator=lambda indices: [{"index": index} for index in indices],
                callbacks=[recorder],
            )
            trainer.merge = collate("llava", UNEQUAL_IMAGES)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.train()
        told = [
            str(warning.message) for warning in caught if "not mappings" in str(warning.message)
        ]
        assert len(told) == patched
        grads.append(recorder.steps[0])
    assert float(grads[0]["pre_head.w1"].norm()) > 0
    assert all(torch.equal(gradient, grads[1][name]) for name, gradient in grads[0].items())


class NoBackward(InOrder):
    def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()


def test_a_training_step_without_the_accelerator(tmp_path: Path) -> None:
    """The first micro-batch is lost, and a warning says so. Later forwards add their own mean to
    the loss."""
    recorder = Recorder()
    model = build("llava")
    handle = apply_pre(model)
    head = copy_of(handle.head)
    with (
        patch_trainer(),
        pytest.warns(UserWarning, match=r"NoBackward.training_step never called") as caught,
    ):
        NoBackward(
            model=model,
            args=arguments(tmp_path, 1, 4, max_steps=3, learning_rate=0.0),
            train_dataset=Samples(EQUAL),
            data_collator=collate("llava", EQUAL),
            callbacks=[recorder],
        ).train()
    assert sum("PRe" in str(w.message) for w in caught) == 1
    assert not recorder.steps[0]["pre_head.w1"].any()
    assert all(torch.equal(p, head[name]) for name, p in handle.head.named_parameters())
    for step in recorder.steps[1:]:
        assert_head(step, by_hand("llava", EQUAL, handle, [0.25] * 4, "mean"))


def test_the_head_is_on_another_gpu_than_the_loss() -> None:
    """As under a device_map over several devices: the Trainer's log is on the device of the loss.
    Fake tensors need no GPU."""
    handle = apply_pre(build("llava"))
    with FakeTensorMode():
        loss, term = torch.ones((), device="cuda:0"), torch.ones((), device="cuda:1")
        trainer = SimpleNamespace(
            args=SimpleNamespace(device=loss.device, logging_nan_inf_filter=True),
            state=SimpleNamespace(global_step=0),
            accelerator=SimpleNamespace(backward=lambda loss: None, num_processes=1),
            get_batch_samples=None,
        )
        counting_of(trainer, handle).step = Step(1, loss, [loss])

        def step() -> torch.Tensor:
            handle._deferred.add(term, term)
            trainer.accelerator.backward(loss)
            return loss

        step_loss = _training_step(handle, step, trainer)
    assert step_loss.device == loss.device


@pytest.mark.parametrize("mode", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("patched", [False, True])
def test_training_lowers_the_loss_and_logs_it(
    mode: bool | None, patched: bool, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"max_steps": 8, "eval_strategy": "no"}
    if mode is not None:
        more |= {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": mode},
        }
    samples = [one_image(5), one_image(4)] * 2
    _, handle, trainer = train("llava", samples, tmp_path, 2, patched, **more)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 8
    assert all(("pre_loss" in entry) is patched for entry in logs)
    if patched:
        assert logs[-1]["pre_loss"] < logs[0]["pre_loss"] - 0.05
        assert logs[-1]["loss"] < logs[0]["loss"]
    else:
        assert handle.metrics()["pre_rows"] == 8 * 4 * 4


@pytest.mark.parametrize("patched", [False, True])
def test_autocast_training(patched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = {}
    for precision in ("bf16", "no"):
        # transformers 4 sets the variable and leaves it.
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        AcceleratorState._reset_state(reset_partial_state=True)
        found, _, trainer = train("llava", EQUAL, tmp_path, 2, patched, bf16=precision == "bf16")
        assert trainer.accelerator.mixed_precision == precision
        gradients[precision] = found["pre_head.w1"]
    error = (gradients["bf16"] - gradients["no"]).abs().max()
    assert 0 < error < 0.05 * gradients["no"].abs().max()


def test_evaluation_is_without_pre(tmp_path: Path) -> None:
    _, handle, trainer = train("llava", EQUAL, tmp_path, 1, patched=True)
    trainer.model.train()(**batch("llava").inputs)  # counted, but not yet logged
    before = handle.metrics(reset=False)
    assert before["pre_rows"] > 0
    with patch_trainer():
        found = trainer.evaluate(Samples(EQUAL))
    assert "eval_loss" in found
    assert not any("pre_loss" in name for name in found)
    assert handle.metrics() == before


def test_patch_is_reversible_and_leaves_other_trainers_alone(tmp_path: Path) -> None:
    before = dict(vars(Trainer))
    patch = patch_trainer()
    model = build("llava")
    recorder = Recorder()
    trainer = InOrder(
        model=model,
        args=arguments(tmp_path, 2, 2),
        train_dataset=Samples(EQUAL),
        data_collator=collate("llava", EQUAL),
        callbacks=[recorder],
    )
    trainer.train()
    assert len(recorder.steps) == 1
    patch.remove()
    patch.remove()
    assert dict(vars(Trainer)) == before
    with patch_trainer(InOrder):
        assert vars(Trainer)["training_step"] is before["training_step"]
    assert "training_step" not in vars(InOrder)


def test_signatures_are_those_before(tmp_path: Path) -> None:
    """Trainer reads the signature of the model's forward, to drop columns that it does not take."""
    methods = [name for name, value in vars(Trainer).items() if inspect.isfunction(value)]
    before = {name: inspect.signature(getattr(Trainer, name)) for name in methods}
    kept = []
    for attached in (False, True):
        model = build("llava")
        if attached:
            apply_pre(model)
        with patch_trainer():
            assert {name: inspect.signature(getattr(Trainer, name)) for name in methods} == before
            trainer = InOrder(
                model=model, args=arguments(tmp_path, 1, 1, remove_unused_columns=True)
            )
            trainer._set_signature_columns_if_needed()
        kept.append(trainer._signature_columns)
    assert kept[0] == kept[1]
