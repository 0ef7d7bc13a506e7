"""apply_pre: in every family the loss and every gradient are those of the equation on the true
input of the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from pre_kernels import reference
from pre_kernels.integrations import apply_pre, families

from .support.attached import every_family, run
from .support.by_hand import (
    assert_same_gradients,
    expected_gradients,
    gradients,
    means,
    projector_rows,
    watch,
)
from .support.tiny.models import DEPTH, FAMILIES, IMAGE, PLAIN, VIDEOS, WIDTH, batch, build


class Calls:
    """Counts the calls of the handle's head."""

    def __init__(self, handle: Any) -> None:
        self.number = 0
        for head in handle.head if isinstance(handle.head, nn.ModuleList) else [handle.head]:
            head.register_forward_hook(self.one)

    def one(self, *_: Any) -> None:
        self.number += 1


@every_family
@pytest.mark.parametrize("layer", [None, 1, DEPTH, [1, 3, DEPTH]], ids=str)
def test_loss_and_gradients(family: str, layer: Any) -> None:
    loss, found, handle, _ = run(family, layer=layer)
    layers = [DEPTH // 2] if layer is None else [layer] if isinstance(layer, int) else layer
    wanted_loss, wanted = expected_gradients(
        build(family), family, batch(family), handle.head, layers
    )
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(found, wanted)


@every_family
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    layers = [1, 2, DEPTH]
    loss, grads, handle, model = run(family, checkpointing=reentrant, layer=layers)
    calls = Calls(handle)
    wanted_loss, wanted = expected_gradients(
        build(family), family, batch(family), handle.head, layers
    )
    torch.testing.assert_close(loss, wanted_loss)
    if reentrant:
        wanted |= dict.fromkeys(
            (name for name in wanted if name.startswith(FAMILIES[family].lost)), None
        )
    assert_same_gradients(grads, wanted)
    # The recomputation in the backward fires the layers' hooks again.
    model(**batch(family).inputs).loss.backward()
    assert calls.number == len(layers)


def routed(family: str) -> bool:
    """Whether the loss may include a term of the router (not for GLM-4V in 4.57)."""
    return family.endswith("_moe") and hasattr(
        CONFIG_MAPPING[family]().get_text_config(), "router_aux_loss_coef"
    )


@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "non-reentrant"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if routed(f)])
def test_router_loss(family: str, checkpointing: bool | None) -> None:
    """Under reentrant checkpointing the plain model loses its gradient too."""
    data = batch(family)
    without = build(family)(**data.inputs).loss
    data.inputs["output_router_logits"] = True
    assert build(family)(**data.inputs).loss > without
    loss, found, handle, _ = run(family, data, checkpointing)
    wanted_loss, wanted = expected_gradients(build(family), family, data, handle.head, [2])
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize(
    "options", [{"loss": "mse"}, {"loss": "smooth_l1"}, {"activation": "silu"}, {"bias": False}]
)
def test_head_options(options: dict[str, Any]) -> None:
    loss, found, handle, _ = run("llava", hidden_dim=20, weight=2, **options)
    assert handle.head.w1.shape == (20, WIDTH)
    plain = {name: value for name, value in options.items() if name != "bias"}
    wanted_loss, wanted = expected_gradients(
        build("llava"), "llava", batch("llava"), handle.head, [2], 2, **plain
    )
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_padding_side(family: str) -> None:
    for side in ("left", "right"):
        data = batch(family, side=side)
        loss, found, handle, _ = run(family, data)
        wanted_loss, wanted = expected_gradients(build(family), family, data, handle.head, [2])
        torch.testing.assert_close(loss, wanted_loss)
        assert_same_gradients(found, wanted)


@pytest.mark.parametrize("level", ["patch", "image"])
@pytest.mark.parametrize("anchor", ["pre_llm", "pre_projector"])
def test_visual_tokens_under_the_attention_mask_do_not_count(level: str, anchor: str) -> None:
    data = batch("llava", [[("image", 8, 8), ("text", 4)], [("image", 8, 8), ("text", 4)]])
    data.inputs["attention_mask"][1, :5] = 0  # the second image is a dummy
    loss, _, handle, _ = run("llava", data, level=level, anchor=anchor)
    assert handle.metrics()["pre_rows"] == (4 if level == "patch" else 1)

    model = build("llava")
    seen = watch(model, "llava")
    base = model(**data.inputs).loss
    h = seen[2][:1, 1:5].flatten(0, 1)
    a = seen["embeds"][:1, 1:5].flatten(0, 1) if anchor == "pre_llm" else seen["projector"][0]
    if level == "image":
        h, a = means(h, [4]), means(a, [4])
    w = handle.head
    torch.testing.assert_close(
        loss, (base + 0.5 * reference.pre_loss(h, a, w.w1, w.b1, w.w2, w.b2)).detach()
    )


@pytest.mark.parametrize("level", ["patch", "image"])
@pytest.mark.parametrize("anchor", ["pre_llm", "pre_projector"])
def test_nothing_but_masked_dummy_images(level: str, anchor: str) -> None:
    data = batch("llava", [[("image", 8, 8), ("text", 4)]])
    data.inputs["attention_mask"][0, :5] = 0
    loss, found, handle, _ = run("llava", data, level=level, anchor=anchor)
    assert loss == build("llava")(**data.inputs).loss
    assert handle.metrics()["pre_rows"] == 0
    for name, parameter in handle.head.named_parameters():
        assert torch.equal(found[f"pre_head.{name}"], torch.zeros_like(parameter))


TEXT: list[Any] = [[("text", 6)], [("text", 9)]]


@every_family
@pytest.mark.parametrize("level", ["patch", "image"])
def test_text_only_batch(family: str, level: str) -> None:
    data = batch(family, TEXT)
    loss, found, handle, _ = run(family, data, level=level)
    plain = build(family)
    wanted = plain(**data.inputs).loss
    wanted.backward()
    assert loss == wanted
    head = {f"pre_head.{name}": torch.zeros_like(p) for name, p in handle.head.named_parameters()}
    assert_same_gradients(found, gradients(plain) | head, rtol=0, atol=0)
    assert handle.metrics()["pre_rows"] == 0


@pytest.mark.parametrize("anchor", ["pre_llm", "pre_projector"])
def test_a_literal_image_token_is_text(anchor: str) -> None:
    data = batch("llava", TEXT)
    data.inputs["input_ids"][0, 3] = IMAGE
    loss, _, handle, _ = run("llava", data, anchor=anchor)
    assert handle.metrics()["pre_rows"] == 0
    assert loss == build("llava")(**data.inputs).loss


@every_family
def test_what_never_reaches_the_head(family: str) -> None:
    model = build(family)
    inputs = batch(family).inputs
    plain = model(**inputs).loss.detach()
    # Without gradients some models and processors use kernels that round differently.
    with torch.no_grad():
        quiet = model(**inputs).loss
    handle = apply_pre(model)
    calls = Calls(handle)
    unlabelled = {k: v for k, v in inputs.items() if k != "labels"}

    model(**unlabelled)
    with torch.no_grad():
        assert model(**inputs).loss == quiet
    handle.enabled = False
    assert model(**inputs).loss == plain
    handle.enabled = True
    handle.weight = 0
    assert model(**inputs).loss == plain
    handle.weight = 0.5
    model.generate(**unlabelled, max_new_tokens=2, do_sample=False)
    model.eval()
    assert model(**inputs).loss == plain
    model.generate(**unlabelled, max_new_tokens=2, do_sample=False)
    assert calls.number == 0
    assert handle.metrics()["pre_forwards"] == 0

    assert model.train()(**inputs).loss != plain
    assert calls.number == 1


def test_tuple_output_and_keys() -> None:
    model = build("llava")
    inputs = batch("llava").inputs
    before = model(**inputs)
    handle = apply_pre(model)
    after = model(**inputs)
    assert list(after.keys()) == list(before.keys())
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert as_tuple[0] == after.loss != before.loss
    assert len(as_tuple) == len(build("llava")(**inputs, return_dict=False))
    handle.remove()


def test_positional_arguments() -> None:
    model = build("llava")
    inputs = batch("llava").inputs
    apply_pre(model)
    wanted = model(**inputs).loss
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "pixel_values")}
    assert model(inputs["input_ids"], inputs["pixel_values"], **rest).loss == wanted


@pytest.mark.parametrize("family", [f for f in FAMILIES if families.FAMILIES[f].projector])
def test_pre_projector_anchor(family: str) -> None:
    """Batches with images, and with videos if the family has them. The model projects all images
    before all videos."""
    tiny = FAMILIES[family]
    data = batch(family, tiny.clips or VIDEOS if tiny.videos else PLAIN)
    loss, found, handle, _ = run(family, data, anchor="pre_projector")
    anchor = projector_rows(family, data)
    wanted_loss, wanted = expected_gradients(
        build(family), family, data, handle.head, [2], anchor=anchor
    )
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("flat", [False, True])
def test_callable_anchor(flat: bool) -> None:
    data = batch("llava")
    target = torch.randn(*data.visual.shape, 7)

    def anchor(inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        assert torch.equal(rows, data.visual)
        assert not torch.is_grad_enabled()
        return target[rows] if flat else target

    loss, grads, handle, _ = run("llava", data, anchor=anchor, anchor_dim=7)
    wanted_loss, wanted = expected_gradients(
        build("llava"), "llava", data, handle.head, [2], anchor=target[data.visual]
    )
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(grads, wanted)


def test_mask_fn_replaces_input_ids() -> None:
    data = batch("llava")
    model = build("llava")
    seen = watch(model, "llava")
    wanted, _, _, attached = run("llava", data, mask_fn=lambda inputs: data.visual)
    model(**data.inputs)
    embedded = {k: v for k, v in data.inputs.items() if k in ("attention_mask", "labels")}
    embedded["inputs_embeds"] = seen["embeds"].detach()
    torch.testing.assert_close(attached(**embedded).loss.detach(), wanted)


def test_autocast_state_of_the_layer() -> None:
    """Wrappers such as accelerate's autocast only `forward`, so the end of the call is outside
    it."""
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    forward = model.forward
    states = []

    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    model.forward = autocast_forward
    handle.head.register_forward_hook(lambda *_: states.append(torch.is_autocast_enabled("cpu")))
    loss = model(**data.inputs).loss
    loss.backward()
    assert states == [True]
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = expected_gradients(build("llava"), "llava", data, handle.head, [2])
    torch.testing.assert_close(loss.detach(), wanted, rtol=2e-3, atol=2e-3)


def test_half_precision_model() -> None:
    model = build("llava").to(torch.bfloat16)
    data = batch("llava")
    data.inputs["pixel_values"] = data.inputs["pixel_values"].bfloat16()
    handle = apply_pre(model)
    assert {p.dtype for p in handle.head.parameters()} == {torch.bfloat16}
    model(**data.inputs).loss.backward()
    assert handle.head.w1.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_metrics(fraction: float) -> None:
    """The logged value is the mean of the added losses, whichever terms were drawn."""
    model = build("llava")
    data = batch("llava")
    base = model(**data.inputs).loss.detach()
    handle = apply_pre(model, [1, 3], weight=0.25, fraction=fraction)
    losses = [(model(**data.inputs).loss.detach() - base) / 0.25 for _ in range(2)]
    assert (losses[0] == losses[1]) == (fraction == 1.0)
    model(**batch("llava", TEXT).inputs)
    metrics = handle.metrics()
    assert metrics["pre_loss"] == pytest.approx(float(sum(losses)) / 2, abs=1e-5)
    assert metrics["pre_loss"] == pytest.approx(
        (metrics["pre_loss/layer_1"] + metrics["pre_loss/layer_3"]) / 2
    )
    assert (metrics["pre_rows"], metrics["pre_forwards"]) == (2 * 12, 3)
    assert handle.metrics()["pre_forwards"] == 0


def test_plain_samples_have_several_images_per_sample() -> None:
    assert [sum(kind == "image" for kind, *_ in sample) for sample in PLAIN] == [1, 2]
