"""task_loss in a loop of one's own: the mean of the own losses of the models, without PRe."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from pre_kernels.integrations import apply_pre

from .support.processes import both
from .support.tiny.models import batch, build
from .support.waits import Waits

TEXT_ONLY = [[("text", 7)]]


def test_a_loop_of_ones_own() -> None:
    """The mean over forwards, whatever the weight and the loss of PRe."""
    model = build("llava")
    data = [batch("llava", seed=0).inputs, batch("llava", TEXT_ONLY, seed=1).inputs]
    plain = [float(model(**inputs).loss.detach()) for inputs in data]
    for options in ({}, {"weight": 3.0, "loss": "mse"}, {"layer": [1, 3]}):
        with apply_pre(model, **options) as handle:
            assert "task_loss" not in handle.metrics()
            for inputs in data:
                model(**inputs).loss.backward()
            assert handle.metrics(reset=False)["task_loss"] == pytest.approx(sum(plain) / 2)
            handle.metrics()
            assert "task_loss" not in handle.metrics()
            model(**data[0])
            assert handle.metrics()["task_loss"] == pytest.approx(plain[0])


@pytest.mark.parametrize("off", [{"enabled": False}, {"weight": 0.0}])
def test_a_loop_of_ones_own_while_pre_is_off(off: dict[str, Any]) -> None:
    """A baseline reads the same key. Only forwards in training with labels count."""
    model = build("llava")
    data = [batch("llava", seed=0).inputs, batch("llava", TEXT_ONLY, seed=1).inputs]
    plain = [model(**inputs).loss.detach() for inputs in data]
    unlabelled = {name: value for name, value in data[0].items() if name != "labels"}
    with apply_pre(model) as handle:
        handle.head.forward = None  # the head is not called
        for name, value in off.items():
            setattr(handle, name, value)
        for inputs, wanted in zip(data, plain, strict=True):
            output = model(**inputs)
            assert torch.equal(output.loss, wanted)
            output.loss.backward()
        model(**unlabelled)
        with torch.no_grad():
            model(**data[0])
        model.eval()
        model(**data[0])
        model.train()
        metrics = handle.metrics()
        assert metrics["task_loss"] == pytest.approx(float(sum(plain)) / 2)
        assert metrics["pre_rows"] == metrics["pre_forwards"] == 0
        assert handle.totals.backward.forwards == 0
        assert "task_loss" not in handle.metrics()
        del handle.head.forward
        model(**data[1])
        handle.enabled, handle.weight = True, 0.5
        model(**data[0])
        assert handle.metrics()["task_loss"] == pytest.approx(float(sum(plain)) / 2)
        assert handle.totals.backward.forwards == 1


def test_pre_that_is_off_waits_for_no_device() -> None:
    model = build("llava")
    inputs = batch("llava").inputs
    with Waits() as wanted:
        model(**inputs)
    with apply_pre(model) as handle:
        handle.weight = 0.0
        with Waits() as found:
            model(**inputs)
        assert found.found == wanted.found
        assert handle.metrics()["task_loss"] > 0


def test_nobody_knows_it_without_labels() -> None:
    model = build("llava")
    inputs = {name: value for name, value in batch("llava").inputs.items() if name != "labels"}
    with apply_pre(model, labels=None) as handle:
        output = model(**inputs)
        (output.logits.float().mean() + handle.loss()).backward()
        metrics = handle.metrics()
    assert metrics["pre_forwards"] == 1
    assert "task_loss" not in metrics


@pytest.mark.parametrize("backward", [False, True])
def test_no_graph_is_kept(backward: bool) -> None:
    class Hook:
        """Kept by the graph that it is in, and by nothing else."""

        def __call__(self, gradient: torch.Tensor) -> None: ...

    with apply_pre(build("llava")) as handle:
        output = handle.model(**batch("llava").inputs)
        hook = Hook()
        output.logits.register_hook(hook)
        alive = weakref.ref(hook)
        del hook
        if backward:
            output.loss.backward()
            assert handle.totals.backward.sums is not None
        del output
        gc.collect()
        assert alive() is None
        assert handle.metrics()["task_loss"] > 0


def loop_on_two() -> dict[str, float]:
    rank = torch.distributed.get_rank()
    model = build("llava")
    with apply_pre(model) as handle:
        for seed in range(2 + rank):
            model(**batch("llava", seed=seed).inputs)

        def summed(totals: torch.Tensor) -> torch.Tensor:
            torch.distributed.all_reduce(totals)
            return totals

        return handle.metrics(combine=summed)


def test_a_loop_of_ones_own_in_two_processes() -> None:
    model = build("llava")
    plain = [float(model(**batch("llava", seed=n).inputs).loss.detach()) for n in (0, 1, 0, 1, 2)]
    for found in both(loop_on_two):
        assert found["task_loss"] == pytest.approx(sum(plain) / 5)
