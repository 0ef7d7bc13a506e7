"""Terms counted ahead of a step if others replace methods of the step, on the class or on the
trainer."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from .support.counting import METHODS, of_the_step, only, own_means, run
from .support.tiny.training import InOrder, assert_head


def nothing_left_out(name: str, trainer: Any) -> None:
    """Another patch replaces a method of the class, without calling the one that was there."""
    plain = vars(Trainer)[name].__wrapped__

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.others_seen = True
        return plain(self, *args, **kwargs)

    setattr(Trainer, name, method)


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_others_replace_later(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like Unsloth, after the launcher."""
    before = {method: vars(Trainer)[method] for method in METHODS}
    try:
        steps, handle, said = run(
            InOrder, tmp_path, prepare=lambda trainer: nothing_left_out(name, trainer)
        )
        # Their method stays.
        assert vars(Trainer)[name] is not before[name]
    finally:
        for method, function in before.items():
            setattr(Trainer, method, function)
    for step in steps:
        assert_head(step, of_the_step(handle))
    assert said == []


class OwnStep(InOrder):
    """A subclass that does not call the methods of the class."""

    def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class OwnSamples(InOrder):
    def get_batch_samples(self, iterator: Any, size: int, *_: Any) -> Any:
        return [next(iterator) for _ in range(size)], None


@pytest.mark.parametrize("kind", [OwnStep, OwnSamples])
def test_methods_of_a_subclass(kind: type, tmp_path: Path) -> None:
    steps, handle, said = run(kind, tmp_path)
    for step in steps:
        assert_head(step, of_the_step(handle))
    assert said == []


def test_a_training_step_that_is_replaced_during_the_training(tmp_path: Path) -> None:
    def prepare(trainer: Any) -> None:
        def begin(*_: Any, **__: Any) -> None:
            trainer.training_step = types.MethodType(OwnStep.training_step, trainer)

        trainer.callback_handler.callbacks[-1].on_train_begin = begin

    steps, handle, said = run(InOrder, tmp_path, prepare=prepare)
    # Each forward then adds its own mean to output.loss.
    for step in steps:
        assert_head(step, own_means(handle))
    only(said, r"a step of InOrder did not come through Trainer.training_step")


def test_steps_that_ask_for_no_samples(tmp_path: Path) -> None:
    def prepare(trainer: Any) -> None:
        def begin(*_: Any, **__: Any) -> None:
            trainer.get_batch_samples = types.MethodType(OwnSamples.get_batch_samples, trainer)

        trainer.callback_handler.callbacks[-1].on_train_begin = begin

    steps, handle, said = run(InOrder, tmp_path, prepare=prepare)
    for step in steps:
        assert_head(step, own_means(handle))
    only(said, r"micro-batches of InOrder did not come from Trainer.get_batch_samples")
