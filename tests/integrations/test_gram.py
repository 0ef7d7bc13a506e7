"""apply_pre(loss="gram"): Gram matrices of each image, which PRe finds, or of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pre_kernels import reference
from pre_kernels.integrations import apply_pre

from .support.by_hand import assert_same_gradients, copy_of, gradients, projector_rows, watch
from .support.tiny.models import batch, build

SIZES = [
    [("text", 2), ("image", 8, 16), ("text", 3), ("image", 8, 8), ("text", 4)],
    [("image", 16, 16), ("text", 5)],
]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_numbers_of_a_mask_fn_in_any_integer_dtype(dtype: torch.dtype) -> None:
    data = batch("llava")
    model = build("llava")
    apply_pre(model, loss="gram", mask_fn=lambda inputs: data.visual.to(dtype))
    assert model(**data.inputs).loss.isfinite()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gram_over": "batch"},
        {"weighting": "image", "depth": 3, "norm": "layer"},
        {"anchor": "pre_projector", "impl": "triton", "nonfinite": "skip"},
    ],
    ids=str,
)
def test_the_equation(family: str, options: dict[str, Any]) -> None:
    data = batch(family, SIZES)
    model = build(family)
    handle = apply_pre(model, 2, loss="gram", **options)
    loss = model(**data.inputs).loss
    loss.backward()

    plain = build(family)
    seen = watch(plain, family)
    head = copy_of(handle.head)
    output = plain(**data.inputs)
    target = seen["embeds"][data.visual]
    if "anchor" in options:
        target = projector_rows(family, data)
    images = torch.arange(len(data.lengths)).repeat_interleave(torch.tensor(data.lengths))
    weight = None
    if "weighting" in options:
        weight = torch.cat([torch.full((n,), 1 / n) for n in data.lengths])
    own = reference.pre_loss(
        seen[2][data.visual],
        target,
        **head,
        norm=options.get("norm"),
        loss="gram",
        images="batch" if "gram_over" in options else images,
        row_weight=weight,
    )
    wanted = output.loss + 0.5 * own
    wanted.backward()
    torch.testing.assert_close(loss.detach(), wanted.detach())
    of_head = {f"pre_head.{name}": p.grad for name, p in head.items()}
    assert_same_gradients(gradients(model), gradients(plain) | of_head)
    metrics = handle.metrics()
    assert metrics["pre_loss"] == pytest.approx(own.item(), rel=1e-5)
    assert -1 <= metrics["pre_cosine"] <= 1


def test_a_batch_without_images_adds_nothing() -> None:
    model = build("llava")
    handle = apply_pre(model, loss="gram")
    model(**batch("llava", [[("text", 6)]]).inputs).loss.backward()
    assert not any(p.grad.any() for p in handle.head.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.5}, "fraction: got 0.5 with loss='gram', .* want 1.0"),
        ({"level": "image"}, "level: got 'image' with loss='gram', .* want 'patch'"),
        ({"gram_over": "ranks"}, "gram_over: got 'ranks', want one of 'image', 'batch'"),
        ({"loss": "mse", "gram_over": "batch"}, "gram_over: got 'batch' with loss='mse', want"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_pre(build("llava"), **{"loss": "gram", **options})
