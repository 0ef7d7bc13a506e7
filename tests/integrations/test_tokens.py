"""The ids of visual tokens are read from the config in each forward, and images without any give a
warning, which costs at most one look at the device."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from pre_kernels.integrations import Reader, apply_pre, families, objective, tokens

from .support.by_hand import assert_same_gradients, expected_gradients, gradients
from .support.tiny.fuyu import fuyu
from .support.tiny.home_made import home_made
from .support.tiny.models import IMAGE, VIDEO, batch, build
from .support.tiny.training import make
from .support.waits import Waits
from .support.warned import pre_warnings

NEW = 55  # not the id of a word in the batches
FOUND_NONE = (
    r"PRe: the forward got pixel_values, but input_ids has none of the image tokens 55 "
    r".*pass mask_fn="
)


def renamed(data: Any, old: int, new: int) -> Any:
    ids = data.inputs["input_ids"]
    data.inputs["input_ids"] = ids.where(ids != old, new)
    return data


def without_pixels(model: nn.Module) -> nn.Module:
    """Accepts images without a place for them, like models whose code keeps the token's id
    elsewhere."""
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "pixel_values"}),
        with_kwargs=True,
    )
    return model


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index"])
def test_an_image_token_that_is_set_after_attaching(name: str) -> None:
    data = renamed(batch("llava"), IMAGE, NEW)
    model, plain = build("llava"), build("llava")
    handle = apply_pre(model)
    for module in (model, plain):
        setattr(module.config, name, NEW)
    assert handle.count(data.inputs) == sum(data.lengths)
    loss = model(**data.inputs).loss
    loss.backward()
    wanted_loss, wanted = expected_gradients(plain, "llava", data, handle.head, [2])
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)
    assert handle.metrics()["pre_tokens"] == sum(data.lengths)


def test_a_video_token_that_is_set_after_attaching() -> None:
    data = batch("qwen2_vl", [[("text", 3), ("video", 4, 8, 8), ("text", 5)]])
    data.inputs.pop("mm_token_type_ids", None)
    model = build("qwen2_vl")
    handle = apply_pre(model)
    model.config.video_token_id = NEW
    assert handle.count(renamed(data, VIDEO, NEW).inputs) == sum(data.lengths)


def test_a_reader_takes_the_config_as_it_is() -> None:
    model = build("llava")
    data = renamed(batch("llava"), IMAGE, NEW)
    with Reader(model, [0]) as reader:
        model.config.image_token_id = NEW
        assert [len(image.anchor) for image in reader.read(data.inputs)] == data.lengths


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_images_without_a_visual_token_are_said_once(
    family: str, recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("always")
    model = without_pixels(build(family))
    data = batch(family)
    handle = apply_pre(model)
    model.config.image_token_id = NEW  # and the collator does not know this
    for number in range(1, 2 * tokens.PATIENCE + 2):
        model(**data.inputs).loss.backward()
        assert len(pre_warnings(recwarn)) == (number >= tokens.PATIENCE)
    assert handle.metrics()["pre_tokens"] == 0
    handle._objective.parts.notices.forget()
    for _ in range(2 * tokens.PATIENCE):
        model(**data.inputs)
    first, second = pre_warnings(recwarn)
    assert first == second
    assert re.search(FOUND_NONE, first)


def test_a_trainer_that_finds_no_visual_token_says_it(
    tmp_path: Any, recwarn: pytest.WarningsRecorder
) -> None:
    model = without_pixels(build("llava"))
    apply_pre(model)
    model.config.image_token_id = NEW
    make(tmp_path, model, max_steps=tokens.PATIENCE).train()
    assert (
        len([text for text in pre_warnings(recwarn) if "has none of the image tokens 55" in text])
        == 1
    )


@pytest.mark.parametrize("case", ["masked", "dummies first", "no images", "image_flags"])
def test_nothing_is_said_of_trainings_in_order(case: str, recwarn: pytest.WarningsRecorder) -> None:
    """Dummy images under the attention mask, before the first real one, as an empty tensor, and
    marked as dummies."""
    model = without_pixels(build("llava"))
    data = batch("llava")
    text = batch("llava", [[("text", 6)], [("text", 9)]]).inputs
    apply_pre(model)
    inputs = [data.inputs] * 6
    if case == "masked":
        data.inputs["attention_mask"] = data.inputs["attention_mask"] * ~data.visual
    elif case == "dummies first":
        inputs = [{**text, "pixel_values": torch.zeros(1, 3, 8, 8)}] * 3 + inputs
    elif case == "no images":
        inputs = [{**text, "pixel_values": torch.zeros(0, 3, 8, 8)}] * 6
    else:
        inputs = [
            {
                **text,
                "pixel_values": torch.zeros(1, 3, 8, 8),
                "image_flags": torch.zeros(1, 1).long(),
            }
        ] * 6
    for kwargs in inputs:
        model(**kwargs).loss.backward()
    assert pre_warnings(recwarn) == []


def test_what_a_forward_tells_of_images_without_tokens() -> None:
    model = without_pixels(build("llava"))
    data = batch("llava")
    parts = apply_pre(model)._objective.parts
    assert tokens.find_tokens(parts, data.inputs, None).empty.tolist() is False
    dummy = {**data.inputs, "attention_mask": torch.zeros_like(data.inputs["attention_mask"])}
    assert tokens.find_tokens(parts, dummy, None).empty.tolist() is False
    assert tokens.find_tokens(parts, data.inputs, lambda inputs: data.visual).empty is None
    model.config.image_token_id = NEW
    assert tokens.find_tokens(parts, data.inputs, None).empty.tolist() is True


def test_images_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits()
    counts = []
    for name in ("find_tokens", "warn_of_images"):
        original = getattr(tokens, name)

        def watched(*args: Any, original: Any = original) -> Any:
            with waits:
                return original(*args)

        monkeypatch.setattr(objective, name, watched)
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    for _ in range(3):
        model(**data.inputs)
        handle.count(data.inputs)
        counts.append(len(waits.found))
    assert counts == [1, 1, 1]


def test_text_in_an_unlisted_family_is_looked_at_ever_more_seldom() -> None:
    waits = Waits()
    model = build("llava")
    text = batch("llava", [[("text", 6)]]).inputs
    parts = families.find_parts(model)
    parts.family = families.GENERIC
    with waits:
        for _ in range(64):
            assert tokens.find_tokens(parts, text, None) is None
    assert len(waits.found) == 7  # the 1st, 2nd, 4th, ..., 64th


def test_images_that_come_late_in_an_unlisted_family(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    model = fuyu()
    apply_pre(model)
    text, ids = torch.tensor([[1, 5, 6, 7, 8]]), torch.tensor([[1, IMAGE, IMAGE, 5, 6]])
    for _ in range(20):
        model(input_ids=text, labels=text)
    assert pre_warnings(recwarn) == []
    for _ in range(20):
        model(input_ids=ids, labels=text)
    (found,) = pre_warnings(recwarn)
    assert re.search(r"2 image tokens, .* none of pixel_values, image_embeds", found)


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits()
    model = build("llava")
    data = batch("llava")
    parts = families.find_parts(model)
    monkeypatch.setattr(tokens, "capturing", lambda: True)
    with waits:
        tokens.warn_of_images(parts, tokens.find_tokens(parts, data.inputs, None), data.inputs)
        parts.family = families.GENERIC
        tokens.find_tokens(parts, {"input_ids": data.inputs["input_ids"]}, None)
    assert waits.found == []


def test_a_config_without_the_token_says_where_to_set_it() -> None:
    model, inputs = home_made()
    message = r"InternVL's own chat code.* set image_token_id .* in config\.json "
    message += r"or in model\.config; or pass mask_fn="
    with pytest.raises(ValueError, match=message):
        apply_pre(model, layers="trunk.blocks")
    model.config.image_token_id = IMAGE
    handle = apply_pre(model, layers="trunk.blocks")
    ids = inputs["ids"]
    assert (
        handle.count({"input_ids": ids, "pixel_values": torch.ones(1)}) == (ids == IMAGE).sum() > 0
    )
