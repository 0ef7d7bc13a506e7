"""The generic rule finds the parts of every listed family, and of models that are not listed."""

from __future__ import annotations

import pytest
import torch
from eager import assert_same_gradients, expected_gradients, gradients
from pre_kernels.integrations import apply_pre, families
from tiny_models import FAMILIES, IMAGE, batch, build, clip, text_config
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration


@pytest.mark.parametrize("family", FAMILIES)
def test_parts(family: str) -> None:
    model = build(family)
    parts = families.find_parts(model)
    assert parts.family is families.FAMILIES[family]
    assert parts.text is model.get_submodule(FAMILIES[family].text)
    assert parts.layers is parts.text.layers
    assert IMAGE in parts.tokens["image"]


def test_tests_and_table_agree() -> None:
    assert set(families.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("by", ["path", "module"])
def test_text_model_can_be_passed(by: str) -> None:
    model, data = build("llava"), batch("llava")
    path = "model.language_model"
    handle = apply_pre(model, text_model=path if by == "path" else model.get_submodule(path))
    loss = model(**data.inputs).loss
    loss.backward()
    wanted, _ = expected_gradients(build("llava"), "llava", data, handle.head, [2])
    torch.testing.assert_close(loss.detach(), wanted)


def unlisted() -> nn.Module:
    torch.manual_seed(0)
    config = VipLlavaConfig(
        vision_config=clip(CLIPVisionConfig),
        text_config=LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -1],
    )
    return VipLlavaForConditionalGeneration(config).train()


def test_an_unlisted_family() -> None:
    data = batch("llava")
    model = unlisted()
    assert model.config.model_type not in families.FAMILIES
    handle = apply_pre(model, 3)
    loss = model(**data.inputs).loss
    loss.backward()
    wanted_loss, wanted = expected_gradients(unlisted(), "llava", data, handle.head, [3])
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)


def test_videos_count_only_with_a_video() -> None:
    model = build("qwen2_5_vl")
    parts = families.find_parts(model)
    ids = torch.tensor([[5, 60, 61, 61, 6]])
    found = families.placeholders(parts, {"input_ids": ids, "pixel_values_videos": torch.ones(1)})
    assert {kind: mask.tolist() for kind, mask in found.items()} == {"video": [[False, False, True, True, False]]}
    both = families.placeholders(parts, {"input_ids": ids, "pixel_values": 1, "pixel_values_videos": 1})
    assert sorted(both) == ["image", "video"]
    assert families.placeholders(parts, {"input_ids": ids, "pixel_values": None}) == {}


def test_runs_and_grids_number_the_images() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]]).bool()
    assert families.runs(mask, "image", {}, None).tolist() == [0, 0, 1, 2, 3]
    config = build("qwen2_vl").config
    grid = torch.tensor([[1, 2, 4], [1, 2, 2], [2, 2, 2]])
    assert families.grids(mask, "image", {"image_grid_thw": grid}, config).tolist() == [0, 0, 1, 2, 2]
