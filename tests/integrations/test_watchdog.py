"""The warning about an L_PRe that is computed and never trained, and the cases in which it must not
come."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from pre_kernels.integrations import apply_pre

from .support.tiny.models import batch, build
from .support.tiny.training import make


def test_the_watchdog_is_quiet_where_the_loss_is_trained(tmp_path: Path, recwarn: Any) -> None:
    model = build("llava")
    data = batch("llava")
    apply_pre(model)
    first = model(**data.inputs).loss
    (first + model(**data.inputs).loss).backward()  # two forwards, one backward
    del first
    for _ in range(3):
        # One forward is only looked at, the gradient of one is looked at, and one is trained.
        model(**data.inputs)
        model(**data.inputs).logits.float().mean().backward()
        model(**data.inputs).loss.backward()
    make(tmp_path, model).train()
    assert not any("back-propagated" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("deferred", [False, True])
def test_the_watchdog_is_quiet_where_no_backward_came(deferred: bool, recwarn: Any) -> None:
    """Several forwards in a row whose losses are only looked at, or lost because something raises
    after them."""
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    for _ in range(3):
        with (
            contextlib.suppress(torch.OutOfMemoryError),
            handle.defer(12.0) if deferred else contextlib.nullcontext(),
        ):
            model(**data.inputs)
            raise torch.OutOfMemoryError("CUDA out of memory")
    model(**data.inputs).loss.backward()
    assert not any("back-propagated" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("trained", [".", "lm_head"])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_watchdog_warns_of_a_loss_of_the_trainers_own(trained: str, as_tuple: bool) -> None:
    """It also comes if nothing below the head's layer trains."""
    model = build("llava")
    data = batch("llava")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in f".{name}")
    apply_pre(model)
    for number in range(4):
        expected = pytest.warns(
            UserWarning, match="last 2 L_PRe were computed but never back-propagated"
        )
        with expected if number == 2 else contextlib.nullcontext():
            model(**data.inputs, return_dict=not as_tuple)[1].float().logsumexp(
                -1
            ).mean().backward()


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "own loss"])
def test_the_watchdog_warns_of_a_training_in_eval_mode(labelled: bool) -> None:
    """`from_pretrained` leaves the model in this mode."""
    model = build("llava").eval()
    data = batch("llava")
    handle = apply_pre(model)
    for number in range(4):
        expected = pytest.warns(
            UserWarning, match=r"last 2 backward passes were of forwards in eval mode"
        )
        with expected if number == 2 else contextlib.nullcontext():
            if labelled:
                model(**data.inputs).loss.backward()
            else:
                with handle.defer(12.0):
                    model(
                        **{k: v for k, v in data.inputs.items() if k != "labels"}
                    ).logits.mean().backward()


def test_the_watchdog_is_quiet_in_evaluation(recwarn: Any) -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    for _ in range(3):
        model.eval()
        model(**data.inputs)
        with torch.no_grad():
            model(**data.inputs)
        with torch.inference_mode():
            model(**data.inputs)
        model(**data.inputs).loss.backward()  # someone looks at a gradient
        model.train()(**data.inputs).loss.backward()
    handle.enabled = False
    model.eval()
    for _ in range(3):
        model(**data.inputs).loss.backward()
    assert not any("eval mode" in str(w.message) for w in recwarn)


def test_steps_of_another_model_are_no_training_of_this_one(recwarn: Any) -> None:
    """Its optimizer may have the id of one that is gone."""
    model = build("llava")
    apply_pre(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch("llava").inputs).loss.backward()
    optimizer.step()
    optimizer.param_groups[0]["params"] = [*torch.nn.Linear(2, 2).parameters()]
    for _ in range(4):
        optimizer.step()
    assert not any("to which PRe is attached" in str(w.message) for w in recwarn)
