"""The generic rule finds the parts of every listed family, and of families that are not listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from pre_kernels.integrations import apply_pre, families

from .support.by_hand import (
    assert_same_gradients,
    copy_of,
    expected_gradients,
    gradients,
    pre_loss,
    watch,
)
from .support.tiny.models import ALL, FAMILIES, IMAGE, batch, build, text_config


@pytest.mark.parametrize("family", FAMILIES)
def test_parts(family: str) -> None:
    model = build(family)
    parts = families.find_parts(model)
    assert parts.family is families.FAMILIES[family]
    assert parts.text is model.get_submodule(FAMILIES[family].text)
    assert parts.layers is parts.text.layers
    assert IMAGE in parts.tokens["image"]


def test_tests_and_table_agree() -> None:
    """The test of the table finds a row that no test builds on this transformers, and a wrong
    version for the installed one."""
    assert families.FAMILIES.keys() == ALL.keys()
    here = Version(transformers.__version__)
    assert {
        name for name, row in families.FAMILIES.items() if Version(row.since) <= here
    } == FAMILIES.keys()
    assert {name for name, row in families.FAMILIES.items() if row.videos} == {
        n for n, t in ALL.items() if t.videos
    }
    for name in FAMILIES:
        parts = families.find_parts(build(name))
        assert parts.config.model_type.replace("-", "_") == name
        assert bool(parts.tokens["video"]) == FAMILIES[name].videos


@pytest.mark.parametrize("by", ["path", "module"])
def test_text_model_can_be_passed(by: str) -> None:
    model = build("llava")
    data = batch("llava")
    path = "model.language_model"
    handle = apply_pre(model, text_model=path if by == "path" else model.get_submodule(path))
    loss = model(**data.inputs).loss
    loss.backward()
    wanted, _ = expected_gradients(build("llava"), "llava", data, handle.head, [2])
    torch.testing.assert_close(loss.detach(), wanted)


def unlist(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    rest = {name: row for name, row in families.FAMILIES.items() if name != family}
    # A family that is deleted from the table itself would come back at the table's end.
    monkeypatch.setattr(families, "FAMILIES", rest)


@pytest.mark.parametrize("family", [f for f in FAMILIES if families.FAMILIES[f].text is None])
def test_the_generic_rule_finds_the_layers_of_every_family(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlist(monkeypatch, family)
    model = build(family)
    parts = families.find_parts(model)
    assert parts.family is families.GENERIC
    assert parts.layers is model.get_submodule(FAMILIES[family].text).layers


def test_an_unlisted_family(monkeypatch: pytest.MonkeyPatch) -> None:
    unlist(monkeypatch, "internvl")
    model = build("internvl")
    data = batch("internvl")
    handle = apply_pre(model, 3, level="image")
    loss = model(**data.inputs).loss
    loss.backward()
    wanted_loss, wanted = expected_gradients(
        build("internvl"), "internvl", data, handle.head, [3], level="image"
    )
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)


def test_a_row_that_names_a_module_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", {"llava": families.Family(text="model.trunk")})
    with pytest.raises(
        ValueError, match=r"text_model: got 'model.trunk', which is not a module of the model"
    ):
        apply_pre(build("llava"))


def pixtral() -> nn.Module:
    """LLaVA's class with the tower of Pixtral, like Pixtral-12B: images of any size."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.PixtralVisionConfig(**vision, image_size=32, patch_size=4),
        text_config=transformers.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config).train()


@pytest.mark.parametrize("options", [{"level": "image"}, {"anchor": "pre_projector"}], ids=str)
def test_llava_around_pixtral(options: dict[str, Any]) -> None:
    data = batch("mistral3")  # the same tokens for the same images
    model = pixtral()
    handle = apply_pre(model, **options)
    loss = model(**data.inputs).loss
    loss.backward()

    twin = pixtral()
    seen = watch(twin, "llava")
    heads = copy_of(handle.head)
    wanted = twin(**data.inputs).loss
    anchor = seen["projector"].detach().flatten(0, -2) if "anchor" in options else None
    wanted = wanted + 0.5 * pre_loss(seen, data, [2], heads, options.get("level", "patch"), anchor)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(
        gradients(model),
        gradients(twin) | {f"pre_head.{name}": p.grad for name, p in heads.items()},
    )


def test_the_end_of_a_path_names_the_projector() -> None:
    aya = build("aya_vision").model
    assert families.find_parts(aya).projector is aya.multi_modal_projector.linear_1
    janus = build("janus").model
    aligner = janus.aligner
    del janus.aligner
    # `aligner` now comes after `generation_aligner`, whose name has the same end.
    janus.aligner = aligner
    assert families.find_parts(janus).projector is aligner
