"""Anchors that a function of the caller's makes: detached, finite, and nothing left behind when it
raises."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch

from pre_kernels.integrations import apply_pre

from .support.tiny.models import batch, build


def test_an_anchor_that_requires_grad_is_detached() -> None:
    model = build("llava")
    data = batch("llava")
    target = torch.randn(12, 7, requires_grad=True)
    apply_pre(model, anchor=lambda inputs, rows: target, anchor_dim=7)
    model(**data.inputs).loss.backward()
    assert target.grad is None


def test_an_anchor_that_raises_keeps_its_traceback_and_leaves_nothing() -> None:
    model = build("llava")
    data = batch("llava")
    broken = True

    def anchor(inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        if broken:
            raise KeyError("encoder")
        return torch.zeros(12, 7)

    handle = apply_pre(model, anchor=anchor, anchor_dim=7)
    with pytest.raises(KeyError, match=r"encoder") as caught:
        model(**data.inputs)
    assert "anchor" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert handle._capture.seen is None
    assert handle._capture.inside is False
    with pytest.raises(KeyError, match=r"encoder"), handle.defer(4.0) as deferred:
        model(**data.inputs)
    assert deferred.counts == []
    broken = False
    assert torch.is_grad_enabled()
    model(**data.inputs).loss.backward()
    assert handle.metrics()["pre_forwards"] == 1


@pytest.fixture
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRE_KERNELS_DEBUG", "1")


@pytest.mark.parametrize("flat", [False, True])
def test_debugging_finds_anchors_that_are_not_finite(flat: bool, debug: None) -> None:
    data = batch("llava")
    # Rows of text may have any value.
    whole = torch.full((*data.visual.shape, 7), float("nan"))
    whole[data.visual] = 1
    for name, bad in (("good", 0), ("bad", 2)):
        whole[0, 4 : 4 + bad, 0] = float("inf")
        model = build("llava")
        apply_pre(model, anchor=lambda inputs, rows: whole[rows] if flat else whole, anchor_dim=7)
        if name == "good":
            assert model(**data.inputs).loss.isfinite()
        else:
            with pytest.raises(
                ValueError, match=r"anchor: got nan or inf in 2 of 12 visual tokens"
            ):
                model(**data.inputs)
