"""A wrong forward raises an error with the argument, the value it got and the value it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pre_kernels.integrations import apply_pre

from .support.tiny.models import FAMILIES, IMAGE, batch, build


def test_inner_model_computes_no_loss() -> None:
    model = build("llava")
    inputs = batch("llava").inputs
    apply_pre(model.model)
    with pytest.raises(RuntimeError, match=r"labels were given but the output has no loss"):
        model.model(**inputs)


def test_pre_projector_with_other_rows_than_tokens() -> None:
    model = build("llava")
    data = batch("llava")
    apply_pre(model, anchor="pre_projector")
    projector = model.model.multi_modal_projector
    projector.register_forward_pre_hook(lambda module, args: (args[0][:, :3],), prepend=True)
    projector.register_forward_hook(
        lambda module, args, output: torch.cat([output, output[:, :1]], 1)
    )
    with pytest.raises(
        ValueError, match=r"anchor: 9 rows entered the projector for 12 visual tokens"
    ):
        model(**data.inputs)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (torch.zeros(11, 5), ValueError, r"anchor: got shape \(11, 5\) for 12 visual tokens"),
        (torch.zeros(12), ValueError, r"anchor: got shape \(12,\)"),
        (
            torch.zeros(12, 6),
            ValueError,
            r"anchor: got shape \(12, 6\), want width 5 \(anchor_dim\)",
        ),
        ([1.0], TypeError, "anchor: the callable returned list"),
        (
            torch.zeros(12, 5, dtype=torch.long),
            TypeError,
            "anchor: the callable returned torch.int64, want a floating",
        ),
    ],
)
def test_bad_callable_anchor(returned: Any, error: type[Exception], message: str) -> None:
    model = build("llava")
    apply_pre(model, anchor=lambda inputs, rows: returned, anchor_dim=5)
    with pytest.raises(error, match=message):
        model(**batch("llava").inputs)


def test_no_input_ids() -> None:
    model = build("llava")
    data = batch("llava")
    apply_pre(model)
    embeds = model.get_input_embeddings()(data.inputs["input_ids"])
    with pytest.raises(ValueError, match=r"input_ids: the forward got none.*pass mask_fn="):
        model(inputs_embeds=embeds, labels=data.inputs["labels"])


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            torch.ones(2, 3, dtype=torch.bool),
            ValueError,
            r"rows: the visual mask has shape \(2, 3\)",
        ),
        (torch.ones(2, 3), TypeError, "mask_fn: returned torch.float32"),
        (None, TypeError, "mask_fn: returned NoneType"),
    ],
)
def test_bad_mask_fn(returned: Any, error: type[Exception], message: str) -> None:
    model = build("llava")
    apply_pre(model, mask_fn=lambda inputs: returned)
    with pytest.raises(error, match=message):
        model(**batch("llava").inputs)


@pytest.mark.parametrize("family", [f for f, tiny in FAMILIES.items() if not tiny.silent])
def test_other_image_tokens_than_features(family: str) -> None:
    """The model itself raises. Nothing of the forward is kept, and the next one is right."""
    model = build(family)
    data = batch(family)
    handle = apply_pre(model)
    loss = model(**data.inputs).loss
    broken = {**data.inputs, "input_ids": data.inputs["input_ids"].clone()}
    row, column = data.visual.nonzero()[0]
    broken["input_ids"][row, column] = 5
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)image"):
        model(**broken)
    assert handle._capture.seen is None
    assert handle.metrics()["pre_forwards"] == 1
    assert model(**data.inputs).loss == loss


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_grid_that_means_other_tokens(family: str) -> None:
    model = build(family)
    data = batch(family)
    handle = apply_pre(model, level="image")
    data.inputs["input_ids"][0, 3] = IMAGE
    with pytest.raises(
        ValueError, match=r"image_grid_thw: stands for 20 image tokens, but input_ids has 21"
    ):
        handle.count(data.inputs)


def test_text_model_called_around_the_attached_one() -> None:
    model = build("llava")
    apply_pre(model)
    with pytest.warns(
        UserWarning, match=r"the text model ran in training outside a call of LlavaFor"
    ):
        model.model.language_model(input_ids=torch.ones(1, 3, dtype=torch.long))
