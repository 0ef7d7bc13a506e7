"""Models that are not from transformers: the arguments they need, and the parts that are found
without arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pre_kernels import reference
from pre_kernels.integrations import apply_pre, families

from .support.by_hand import assert_same_gradients, copy_of, gradients
from .support.tiny.home_made import home_made
from .support.tiny.models import DEPTH, IMAGE


def by_path(model: Any) -> dict[str, Any]:
    return {"layers": "trunk.blocks"}


def by_module(model: Any) -> dict[str, Any]:
    return {"layers": model.trunk.blocks}


def by_text_model(model: Any) -> dict[str, Any]:
    model.trunk.layers = model.trunk.blocks
    return {"text_model": "trunk"}


@pytest.mark.parametrize("given", [by_path, by_module, by_text_model])
def test_home_made_model(given: Any) -> None:
    model, inputs = home_made()
    # `trunk` itself is never called, so the anchor is the input of the first block.
    handle = apply_pre(
        model, [1, DEPTH], mask_fn=lambda kwargs: kwargs["ids"] == IMAGE, **given(model)
    )
    loss = model(**inputs)["loss"]
    loss.backward()
    grads = gradients(model)

    plain, _ = home_made()
    given(plain)
    hidden = {}
    for number, block in enumerate(plain.trunk.blocks, 1):
        block.register_forward_hook(
            lambda _, args, output, number=number: hidden.update({number: (args[0], output)})
        )
    heads = copy_of(handle.head)
    wanted = plain(**inputs)["loss"]
    visual = inputs["ids"] == IMAGE
    anchor = hidden[1][0][visual].detach()
    for i, number in enumerate((1, DEPTH)):
        parameters = [heads[f"{i}.{name}"] for name in ("w1", "b1", "w2", "b2")]
        wanted = wanted + 0.25 * reference.pre_loss(hidden[number][1][visual], anchor, *parameters)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(
        grads, gradients(plain) | {f"pre_head.{name}": p.grad for name, p in heads.items()}
    )


def test_layers_of_the_model_itself() -> None:
    """`inputs_embeds` of the whole model are not the anchor then, because images are not merged
    yet."""
    model, inputs = home_made()
    model.blocks = model.trunk.blocks
    parts = families.find_parts(model, layers="blocks")
    assert parts.text is None
    apply_pre(model, layers="blocks", mask_fn=lambda kwargs: kwargs["ids"] == IMAGE)
    loss = model(**inputs)["loss"]
    assert model(**inputs, inputs_embeds=model.words(inputs["ids"]))["loss"] == loss


def test_layers_of_another_number_than_the_configs_are_passed_by() -> None:
    model, _ = home_made(num_hidden_layers=DEPTH)
    model.layers = nn.ModuleList([nn.Linear(8, 8)])  # for example those of an encoder
    model.decoder = model.trunk
    model.trunk.layers = model.trunk.blocks
    assert families.find_parts(model).layers is model.trunk.blocks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {},
            ValueError,
            r"no decoder layers in HomeMade: looked for a ModuleList `\.layers` .* "
            r"pass text_model= .* layers=",
        ),
        ({"layers": "trunk"}, TypeError, "layers: got a Module, want the ModuleList"),
        (
            {"layers": "trunk.nothing"},
            ValueError,
            "layers: got 'trunk.nothing', which is not a module",
        ),
        ({"layers": [1, 2]}, TypeError, "layers: got list, .*go into layer="),
        (
            {"layers": nn.ModuleList()},
            ValueError,
            "layers: got a ModuleList that is not part of the model",
        ),
        ({"layers": "empty"}, ValueError, "layers: got an empty ModuleList"),
        ({"text_model": 3}, TypeError, "text_model: got int"),
        (
            {"text_model": nn.Linear(1, 1)},
            ValueError,
            "text_model: got a Linear that is not part of the model",
        ),
        ({"layers": "trunk.blocks"}, ValueError, "names no visual tokens .*pass mask_fn="),
    ],
)
def test_what_to_pass_for_a_home_made_model(
    arguments: Any, error: type[Exception], message: str
) -> None:
    model, _ = home_made()
    model.empty = nn.ModuleList()
    with pytest.raises(error, match=message):
        apply_pre(model, **arguments)
    assert not hasattr(model, "pre_head")


def test_visual_tokens_by_config_need_input_ids() -> None:
    model, inputs = home_made(image_token_id=IMAGE)
    apply_pre(model, layers="trunk.blocks")
    with pytest.raises(ValueError, match=r"input_ids: the forward got none.*pass mask_fn="):
        model(**inputs)


def test_layers_that_take_their_hidden_states_by_another_name() -> None:
    model, inputs = home_made()
    apply_pre(model, layers="trunk.blocks", mask_fn=lambda kwargs: kwargs["ids"] == IMAGE)
    for block in model.trunk.blocks:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: ((), {"x": args[0]}), with_kwargs=True, prepend=True
        )
    with pytest.raises(
        RuntimeError, match=r"layers: .*hidden states as the first positional .*got x"
    ):
        model(**inputs)
