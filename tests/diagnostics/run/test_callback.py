"""The callback logs the metrics that the diagnostics give for the same weights, and does not change
the training."""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pre_kernels.diagnostics import LayerReport, Sample, measure
from pre_kernels.diagnostics.run.callback import LayerCallback
from pre_kernels.integrations import Reader, apply_pre, patch_trainer

from ...integrations.support import split_trainings
from ...integrations.support.processes import both
from ...integrations.support.ranks import need_deepspeed
from ...integrations.support.tiny.models import DEPTH, batch, build
from ...integrations.support.tiny.training import EQUAL, InOrder, Samples, arguments, collate
from ...slow import thinned

MASKS = torch.tensor([[True, True, False, False], [False, False, True, True]])


def held_out(count: int = 12) -> list[Sample]:
    """Images of two classes that differ in their pixels."""
    found = []
    for index in range(count):
        inputs = batch(
            "llava", [[("text", 2), ("image", 8, 8), ("text", 3)]], seed=100 + index
        ).inputs
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        inputs["pixel_values"] = inputs["pixel_values"] + 2 * (index % 2)
        found.append(Sample(inputs, label=index % 2, masks=MASKS, grid=(2, 2)))
    return found


def trainer_of(folder: Path, attached: bool = True, **more: Any) -> Any:
    model = build("llava")
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.2  # so that a number drawn elsewhere would show
    if attached:
        apply_pre(model)
    return InOrder(
        model=model,
        args=arguments(folder, 1, 2, **({"max_steps": 5, "learning_rate": 0.01} | more)),
        train_dataset=Samples(EQUAL * 3),
        data_collator=collate("llava", EQUAL * 3),
    )


def measured(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "layers_seconds" in entry]


def metrics(entry: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name.startswith("layer_")}


def offline(model: torch.nn.Module, layers: Any = (0, 2, DEPTH)) -> dict[str, float]:
    report = LayerReport(("structure", "cosine", "probe"))
    with Reader(model, layers) as reader:
        list(measure(reader, held_out(), report))
    labels = ("layer", "images", "tokens", "notes", "probe_test", "probe_chance")
    return {
        f"layer_{row['layer']}/{name}": value
        for row in report.rows()
        for name, value in row.items()
        if name not in labels and value is not None
    }


def test_the_log_is_what_the_checkpoints_give(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=2)
    first = offline(copy.deepcopy(trainer.model))
    trainer.add_callback(LayerCallback(trainer, held_out(), every=2, max_share=None))
    with patch_trainer():
        trainer.train()
    entries = measured(trainer)
    assert [entry["step"] for entry in entries] == [0, 2, 4, 5]
    assert metrics(entries[0]) == pytest.approx(first)
    assert {
        "layer_0/linear_probe",
        "layer_2/contrast",
        f"layer_{DEPTH}/cosine",
        "layer_2/near",
    } <= first.keys()
    assert metrics(entries[1]) != pytest.approx(first)
    for entry in entries[1:3]:
        saved = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{entry['step']}")
        assert metrics(entry) == pytest.approx(offline(saved), rel=1e-5)
    assert all(0 < entry["layers_share"] <= 1 for entry in entries)
    # The training's own logs still have PRe's values.
    assert any("pre_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("attached", [False, True])
def test_training_continues_bit_for_bit(attached: bool, tmp_path: Path) -> None:
    losses, weights = [], []
    for watched in (False, True):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, attached)
        if watched:
            scored = LayerCallback(
                trainer, held_out(), 1, max_share=None, score=lambda model: float(torch.rand(()))
            )
            trainer.add_callback(scored)
        with patch_trainer() if attached else contextlib.nullcontext():
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(trainer.model.state_dict())
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_measuring_is_bounded(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.add_callback(LayerCallback(trainer, held_out(), every=1, max_share=1e-6))
    with pytest.warns(
        UserWarning, match=r"more than max_share=1e-06; some measurements are skipped"
    ) as caught:
        trainer.train()
    assert [entry["step"] for entry in measured(trainer)] == [0, 5]
    assert sum("max_share" in str(warning.message) for warning in caught) == 1

    generous = trainer_of(tmp_path)
    generous.add_callback(LayerCallback(generous, held_out(), every=1, max_share=1.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PRe")
        generous.train()
    assert [entry["step"] for entry in measured(generous)] == [0, 1, 2, 3, 4, 5]


def test_scores(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    modes: list[bool] = []

    def score(model: torch.nn.Module) -> dict[str, float]:
        modes.append(model.training or torch.is_grad_enabled())
        return {"vqa": 0.25}

    trainer.add_callback(
        LayerCallback(trainer, held_out(), 1, layers=(2,), metrics=("probe",), score=score)
    )
    trainer.train()
    assert [entry["vqa"] for entry in measured(trainer)] == [0.25, 0.25]
    assert modes == [False, False]
    assert metrics(measured(trainer)[0]).keys() == {"layer_2/linear_probe", "layer_2/knn_probe"}

    other = trainer_of(tmp_path)
    assert LayerCallback(other, held_out(), 1, score=lambda model: 1).measure()["score"] == 1
    with pytest.raises(ValueError, match="score: returned nan for 'score', want a finite number"):
        LayerCallback(other, held_out(), 1, score=lambda model: float("nan")).measure()
    assert not any(
        type(hook).__name__ == "Reader"
        for m in other.model.modules()
        for hook in m._forward_hooks.values()
    )


def test_what_the_wrapper_computes_is_measured(tmp_path: Path) -> None:
    """DeepSpeed applies torch_autocast around the call of its engine, not inside the model."""
    trainer = trainer_of(tmp_path)
    callback = LayerCallback(trainer, held_out(), 1)
    plain = offline(trainer.model)
    trainer.model_wrapped = torch.autocast("cpu", torch.bfloat16)(trainer.model.__call__)
    wrapped = metrics(callback.measure())["layer_2/contrast"]
    assert wrapped == pytest.approx(plain["layer_2/contrast"], rel=0.05)
    assert wrapped != pytest.approx(plain["layer_2/contrast"], rel=1e-6)


class Watched(InOrder):
    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(LayerCallback(self, held_out(), every=1, max_share=0.9999))
        return super().train(*args, **kwargs)


def in_two_processes(how: str, folder: str) -> Any:
    trainers: list[Any] = []
    with mock.patch.object(
        split_trainings, "InOrder", lambda **more: trainers.append(Watched(**more)) or trainers[-1]
    ):
        run, *settings = split_trainings.RUNS[how]
        run(*settings, folder, 2, None)
    return [(entry["step"], metrics(entry)) for entry in measured(trainers[0])]


@pytest.mark.parametrize("how", thinned(["FSDP2", "FSDP1", "DDP", "ZeRO-3"], 4))
def test_two_processes(how: str, tmp_path: Path) -> None:
    """Measuring works even if no process has the whole model."""
    if "ZeRO" in how:
        need_deepspeed()
    zero, one = both(in_two_processes, how, str(tmp_path))
    assert [step for step, _ in zero] == [step for step, _ in one]  # both measured or neither
    assert zero[0][1] == pytest.approx(offline(build("llava")), rel=1e-4)
    assert zero[-1] == (2, pytest.approx(one[-1][1], rel=1e-5))
    assert zero[-1][1] != pytest.approx(zero[0][1], rel=1e-4)


def test_bad_input(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    samples = held_out(2)
    with pytest.raises(TypeError, match=r"trainer: got Llava\w+, want a transformers.Trainer"):
        LayerCallback(trainer.model, samples, 1)
    with pytest.raises(ValueError, match="every: got 0, want a positive number of steps"):
        LayerCallback(trainer, samples, 0)
    with pytest.raises(TypeError, match="samples: got none, want at least one Sample"):
        LayerCallback(trainer, [], 1)
    with pytest.raises(TypeError, match="samples: got dict"):
        LayerCallback(trainer, [{}], 1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="layers: got 9 among them"):
        LayerCallback(trainer, samples, 1, layers=(9,))
    with pytest.raises(ValueError, match="metrics: got"):
        LayerCallback(trainer, samples, 1, metrics=("everything",))
    with pytest.raises(ValueError, match="max_share: got 0"):
        LayerCallback(trainer, samples, 1, max_share=0)
    with pytest.raises(TypeError, match="score: got float"):
        LayerCallback(trainer, samples, 1, score=0.5)  # type: ignore[arg-type]
