"""task_loss: the loss without what PRe added to it, in every way of training; exact, or not there.

The oracle is a training without PRe on the same batches, whose parameters never move: what it logs
as `loss` is what the training with PRe has to log as `task_loss`.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerCallback

from pre_kernels.integrations import apply_pre, patch_trainer
from pre_kernels.integrations.pre_callback import PreCallback

from .support.processes import both
from .support.tiny.models import build
from .support.tiny.training import (
    UNEQUAL_IMAGES,
    InOrder,
    Samples,
    arguments,
    collate,
    one_image,
    own_loss,
)
from .support.waits import Waits

TEXT = [("text", 7)]
# transformers 4 rounds each loss that it logs to 4 decimals, so two differ by up to 1e-4.
EXACT = 2e-6 if int(transformers.__version__.split(".")[0]) > 4 else 1e-4 + 2e-6


class BackwardOfItsOwn(InOrder):
    """Never calls accelerator.backward, so forwards add to `output.loss` from the second one on."""

    def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss / self.args.gradient_accumulation_steps
        loss.backward()
        return loss.detach()


class Otherwise(BackwardOfItsOwn):
    """Reports something else than what it back-propagates."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 3 * super().training_step(*args, **kwargs)


class LossOfItsOwn(InOrder):
    """As TRL's do."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        output = model(**inputs)
        flat = output.logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten())
        return (loss, output) if return_outputs else loss


class LossFunction(InOrder):
    def __init__(self, **options: Any) -> None:
        super().__init__(compute_loss_func=own_loss, **options)


class Plus(InOrder):
    """Adds to the loss that the model returns."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + 1.5


def logs(
    folder: Path,
    way: str | None,
    kind: type = InOrder,
    family: str = "llava",
    samples: Any = UNEQUAL_IMAGES,
    accumulation: int = 2,
    apply: dict[str, Any] | None = None,
    callbacks: Any = (),
    **more: Any,
) -> list[dict[str, float]]:
    """The training logs of 4 steps, each of all samples; `way`: "patch", "callback", or None for a
    training without PRe."""
    model = build(family)
    apply = apply or {}
    callbacks = list(callbacks)
    if way == "patch":
        apply_pre(model, **apply)
    if way == "callback":
        callbacks.append(PreCallback(**apply))
    size = more.pop("size", len(samples) // accumulation)
    options = {"learning_rate": 0.0, "max_steps": 4, "logging_steps": 2, **more}
    with patch_trainer() if way == "patch" else contextlib.nullcontext():
        trainer = kind(
            model=model,
            args=arguments(folder, accumulation, size, **options),
            train_dataset=Samples(samples),
            data_collator=collate(family, samples),
            callbacks=callbacks,
        )
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def agree(found: list[dict[str, float]], plain: list[dict[str, float]], added: bool = True) -> None:
    assert [entry["step"] for entry in found] == [entry["step"] for entry in plain]
    for entry, without in zip(found, plain, strict=True):
        assert entry["task_loss"] == pytest.approx(without["loss"], abs=EXACT)
        assert (abs(entry["loss"] - entry["task_loss"]) > 0.001) == added
        assert "task_loss" not in without


WAYS = [
    ("patch", InOrder),
    ("patch", LossOfItsOwn),
    ("patch", LossFunction),
    ("patch", Plus),
    ("callback", InOrder),
]


@pytest.mark.parametrize(
    ("way", "kind", "accumulation"),
    [
        *((way, kind, 2) for way, kind in WAYS),
        *((way, InOrder, n) for way in ("patch", "callback") for n in (1, 4)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_it_is_the_loss_of_a_training_without_pre(
    way: str, kind: type, accumulation: int, tmp_path: Path
) -> None:
    """Micro-batches with different numbers of labels and of images; one is text only."""
    plain = logs(tmp_path, None, kind, accumulation=accumulation)
    agree(logs(tmp_path, way, kind, accumulation=accumulation), plain)


@pytest.mark.parametrize("way", ["patch", "callback"])
def test_a_loss_that_is_not_scaled_by_items(way: str, tmp_path: Path) -> None:
    """This family's forward takes no num_items_in_batch: the Trainer divides by micro-batches."""
    plain = logs(tmp_path, None, family="qwen2_5_vl")
    agree(logs(tmp_path, way, family="qwen2_5_vl"), plain)


@pytest.mark.parametrize("way", ["patch", "callback"])
def test_an_epoch_that_ends_in_a_short_step(way: str, tmp_path: Path) -> None:
    """The last step of each epoch has one micro-batch, the others two."""
    samples = [one_image(n) for n in (2, 9, 4)]
    options = {"size": 1, "logging_steps": 1, "samples": samples}
    agree(logs(tmp_path, way, **options), logs(tmp_path, None, **options))


def test_a_trainer_with_a_backward_of_its_own(tmp_path: Path) -> None:
    """Its first micro-batch has no L_PRe, all others have it in `output.loss`."""
    with pytest.warns(UserWarning, match="never called accelerator.backward"):
        found = logs(tmp_path, "patch", BackwardOfItsOwn)
    agree(found, logs(tmp_path, None, BackwardOfItsOwn))


@pytest.mark.filterwarnings("ignore:PRe. L_PRe was computed but")
def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    found = logs(tmp_path, "patch", Otherwise)
    assert not any("task_loss" in entry for entry in found)
    assert all("pre_loss" in entry for entry in found)
    found = logs(tmp_path, "callback", Plus)
    assert not any("task_loss" in entry for entry in found)


class IgnoresTheLoss(InOrder):
    """The model's loss has L_PRe in it, and is left out."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        output = model(**inputs)
        return output.logits.float().square().mean()


@pytest.mark.filterwarnings("ignore:PRe. the last 2 ")
def test_a_loss_of_the_trainers_own_by_a_callback(tmp_path: Path) -> None:
    """Without labels nothing is added. With them it is not known what became of it."""
    plain = logs(tmp_path, None, LossOfItsOwn)
    agree(logs(tmp_path, "callback", LossOfItsOwn), plain, added=False)
    found = logs(tmp_path, "callback", IgnoresTheLoss)
    assert not any("task_loss" in entry for entry in found)


def test_the_loss_less_lambda_times_pre_loss(tmp_path: Path) -> None:
    """Of one micro-batch a step, while the parameters move."""
    for way in ("patch", "callback"):
        options = {"accumulation": 1, "logging_steps": 1, "learning_rate": 0.1}
        found = logs(tmp_path, way, samples=[one_image(5)] * 2, apply={"weight": 0.7}, **options)
        assert len(found) == 4
        for entry in found:
            wanted = entry["loss"] - 0.7 * entry["pre_loss"]
            assert entry["task_loss"] == pytest.approx(wanted, abs=EXACT)
        assert found[0]["task_loss"] > found[-1]["task_loss"] + 0.1


@pytest.mark.parametrize("way", ["patch", "callback"])
def test_a_weight_that_moves_nothing(way: str, tmp_path: Path) -> None:
    options = {"learning_rate": 0.1, "samples": [one_image(5)] * 4}
    found = logs(tmp_path, way, apply={"weight": 1e-30}, **options)
    plain = logs(tmp_path, None, **options)
    agree(found, plain, added=False)
    assert plain[0]["loss"] > plain[-1]["loss"] + 0.1


@pytest.mark.parametrize("way", ["patch", "callback"])
def test_a_schedule_of_the_weight(way: str, tmp_path: Path) -> None:
    options = {"logging_steps": 1}
    found = logs(tmp_path, way, apply={"schedule": "cosine", "warmup": 0.5}, **options)
    agree(found, logs(tmp_path, None, **options))
    parts = [entry["loss"] - entry["task_loss"] for entry in found]
    assert parts[1] / parts[0] == pytest.approx(3, abs=0.02)  # λ of the first steps is 1/8 and 3/8


@pytest.mark.parametrize("way", ["patch", "callback"])
def test_no_weight(way: str, tmp_path: Path) -> None:
    """The key is there all the same, so that a curve has no gap."""
    agree(logs(tmp_path, way, apply={"weight": 0.0}), logs(tmp_path, None), added=False)


class Toggle(TrainerCallback):
    """PRe is on in steps 1 and 4 of 4 only, or in `steps`."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        from pre_kernels.integrations import find_handle

        find_handle(model).enabled = state.global_step + 1 in self.steps


def test_enabled_is_toggled(tmp_path: Path) -> None:
    plain = logs(tmp_path, None)
    agree(logs(tmp_path, "patch", callbacks=[Toggle((1, 4))]), plain)
    found = logs(tmp_path, "patch", callbacks=[Toggle((1, 2))])
    agree(found[:1], plain[:1])
    agree(found[1:], plain[1:], added=False)
    # A callback does not see the losses of forwards that PRe leaves alone.
    found = logs(tmp_path, "callback", callbacks=[Toggle((1, 4))])
    assert not any("task_loss" in entry for entry in found)
    found = logs(tmp_path, "callback", callbacks=[Toggle((1, 2))])
    agree(found[:1], plain[:1])
    agree(found[1:], plain[1:], added=False)


@pytest.mark.parametrize("way", ["patch", "callback"])
def test_text_only(way: str, tmp_path: Path) -> None:
    samples = [TEXT] * 4
    found = logs(tmp_path, way, samples=samples)
    agree(found, logs(tmp_path, None, samples=samples), added=False)
    assert not any("pre_loss" in entry for entry in found)


class Poisoned(InOrder):
    """The third micro-batch's loss is nan."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.nan if self.calls == 3 else loss


def test_the_trainers_filter_of_losses_that_are_not_finite(tmp_path: Path) -> None:
    options = {"max_grad_norm": 0.0, "logging_steps": 4, "max_steps": 4}
    agree(logs(tmp_path, "patch", Poisoned, **options), logs(tmp_path, None, Poisoned, **options))
    options |= {"logging_nan_inf_filter": False}
    (entry,) = logs(tmp_path, "patch", Poisoned, **options)
    assert math.isnan(entry["loss"])
    assert "task_loss" not in entry
    for options["logging_nan_inf_filter"] in (True, False):
        (entry,) = logs(tmp_path, "callback", Poisoned, **options)
        assert "task_loss" not in entry


@pytest.mark.parametrize("way", ["patch", "callback"])
def test_resuming(way: str, tmp_path: Path) -> None:
    """The steps since the last log are those of this training."""
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    logs(tmp_path, way, **options)

    class Resumed(InOrder):
        def train(self, **_: Any) -> Any:
            return super().train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    found = logs(tmp_path, way, Resumed, **options)
    assert [entry["step"] for entry in found] == [1, 2, 3, 4]
    agree(found[3:], logs(tmp_path, None, logging_steps=1)[3:])


def test_both_ways_at_once(tmp_path: Path) -> None:
    """The callback comes after the patch, which knows better."""
    plain = logs(tmp_path, None, LossOfItsOwn)
    agree(logs(tmp_path, "patch", LossOfItsOwn, callbacks=[PreCallback()]), plain)


class Reads(TrainerCallback):
    """Somebody reads the metrics, and resets them, between two logs."""

    def on_substep_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        from pre_kernels.integrations import find_handle

        find_handle(model).metrics()


def test_metrics_that_somebody_else_resets(tmp_path: Path) -> None:
    plain = logs(tmp_path, None)
    agree(logs(tmp_path, "patch", callbacks=[Reads()]), plain)
    found = logs(tmp_path, "callback", callbacks=[Reads()])
    assert not any("task_loss" in entry for entry in found)


def on_two(folder: str, way: str | None, kind: type, **more: Any) -> list[dict[str, float]]:
    return logs(Path(folder), way, kind, ddp_backend="gloo", size=1, **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kind", "family"),
    [
        *((way, kind, "llava") for way, kind in WAYS),
        ("patch", InOrder, "qwen2_5_vl"),
        ("callback", InOrder, "qwen2_5_vl"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_two_processes(way: str, kind: type, family: str, tmp_path: Path) -> None:
    """One process has a micro-batch without images; the families differ in the loss's scale."""
    plain = both(on_two, str(tmp_path), None, kind, family=family)
    for found, without in zip(
        both(on_two, str(tmp_path), way, kind, family=family), plain, strict=True
    ):
        agree(found, without)


class Steps(TrainerCallback):
    """What reads the device in each step."""

    def __init__(self) -> None:
        self.waits: list[list[str]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.mode = Waits()
        self.mode.__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.mode.__exit__(None, None, None)
        self.waits.append(self.mode.found)


@pytest.mark.parametrize("way", ["patch", "callback"])
def test_no_step_waits_for_the_device(way: str, tmp_path: Path) -> None:
    """After the first step, which looks whether the first images have visual tokens."""
    found, wanted = Steps(), Steps()
    logs(tmp_path, way, callbacks=[found])
    logs(tmp_path, None, callbacks=[wanted])
    assert found.waits[1:] == wanted.waits[1:]
