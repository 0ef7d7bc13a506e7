"""The generic rule finds the parts of every listed family, and of models that are not listed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn import functional as F

from pre_kernels import reference
from pre_kernels.integrations import apply_pre, families, image_rules
from pre_kernels.integrations import tokens as rows

from .support.by_hand import (
    assert_same_gradients,
    copy_of,
    expected_gradients,
    gradients,
    pre_loss,
    watch,
)
from .support.tiny.models import ALL, DEPTH, FAMILIES, IMAGE, VIDEO, batch, build, text_config


@pytest.mark.parametrize("family", FAMILIES)
def test_parts(family: str) -> None:
    model = build(family)
    parts = families.find_parts(model)
    assert parts.family is families.FAMILIES[family]
    assert parts.text is model.get_submodule(FAMILIES[family].text)
    assert parts.layers is parts.text.layers
    assert IMAGE in parts.tokens["image"]


def test_tests_and_table_agree() -> None:
    """A row that no test builds on this transformers, or a version that is wrong here, is found."""
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
    model, data = build("llava"), batch("llava")
    path = "model.language_model"
    handle = apply_pre(model, text_model=path if by == "path" else model.get_submodule(path))
    loss = model(**data.inputs).loss
    loss.backward()
    wanted, _ = expected_gradients(build("llava"), "llava", data, handle.head, [2])
    torch.testing.assert_close(loss.detach(), wanted)


def unlist(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    rest = {name: row for name, row in families.FAMILIES.items() if name != family}
    monkeypatch.setattr(
        families, "FAMILIES", rest
    )  # deleted from the table itself it would come back at its end


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
    model, data = build("internvl"), batch("internvl")
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
        ValueError, match=r"text_model: got 'model.trunk', which is no module of the model"
    ):
        apply_pre(build("llava"))


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = 1 + index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x).cumsum(1)) / self.scale


class HomeMade(nn.Module):
    """A VLM that has nothing of transformers: blocks at a place of their own, images merged before
    the first."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8, **config)
        self.words, self.eye = nn.Embedding(64, 8), nn.Linear(5, 8)
        self.trunk = nn.Module()
        self.trunk.blocks = nn.ModuleList(Block(i) for i in range(DEPTH))
        self.out = nn.Linear(8, 64)

    def forward(
        self,
        ids: torch.Tensor,
        patches: torch.Tensor,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        x = self.words(ids) if inputs_embeds is None else inputs_embeds
        x = x.masked_scatter((ids == IMAGE)[..., None], self.eye(patches))
        for block in self.trunk.blocks:
            x = block(x)
        logits = self.out(x)
        return {"logits": logits} | (
            {} if labels is None else {"loss": F.cross_entropy(logits.flatten(0, 1), labels)}
        )


def home_made(**config: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.tensor([[3, IMAGE, IMAGE, 4, 5], [IMAGE, 6, IMAGE, 7, 8]])
    inputs = {"ids": ids, "patches": torch.randn(4, 5), "labels": torch.randint(50, (10,))}
    return HomeMade(**config), inputs


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
    # `trunk` itself is never called, so the anchor is the first block's input
    handle = apply_pre(
        model, [1, DEPTH], mask_fn=lambda kwargs: kwargs["ids"] == IMAGE, **given(model)
    )
    loss = model(**inputs)["loss"]
    loss.backward()
    found = gradients(model)

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
        found, gradients(plain) | {f"pre_head.{name}": p.grad for name, p in heads.items()}
    )


def test_layers_of_the_model_itself() -> None:
    """Then `inputs_embeds` of the whole model are not the anchor: the images are not in them
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
    model.layers = nn.ModuleList([nn.Linear(8, 8)])  # of an encoder, say
    model.decoder = model.trunk
    model.trunk.layers = model.trunk.blocks
    assert families.find_parts(model).layers is model.trunk.blocks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {},
            ValueError,
            r"no decoder layers in HomeMade: looked for a ModuleList `\.layers` .* pass text_model= .* layers=",
        ),
        ({"layers": "trunk"}, TypeError, "layers: got a Module, want the ModuleList"),
        (
            {"layers": "trunk.nothing"},
            ValueError,
            "layers: got 'trunk.nothing', which is no module",
        ),
        ({"layers": [1, 2]}, TypeError, "layers: got list, .*go into layer="),
        (
            {"layers": nn.ModuleList()},
            ValueError,
            "layers: the ModuleList that was given is no part",
        ),
        ({"layers": "empty"}, ValueError, "layers: got an empty ModuleList"),
        ({"text_model": 3}, TypeError, "text_model: got int"),
        (
            {"text_model": nn.Linear(1, 1)},
            ValueError,
            "text_model: the Linear that was given is no part",
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


def pixtral() -> nn.Module:
    """LLaVA's class around Pixtral's tower, as Pixtral-12B has it: images of any size."""
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


def test_videos_count_only_with_a_video() -> None:
    model = build("qwen2_5_vl")
    parts = families.find_parts(model)
    ids = torch.tensor([[5, 60, 61, 61, 6]])
    found = rows.placeholders(parts, {"input_ids": ids, "pixel_values_videos": torch.ones(1)})
    assert {kind: mask.tolist() for kind, mask in found.items()} == {
        "video": [[False, False, True, True, False]]
    }
    both = rows.placeholders(parts, {"input_ids": ids, "pixel_values": 1, "pixel_values_videos": 1})
    assert sorted(both) == ["image", "video"]
    assert rows.placeholders(parts, {"input_ids": ids, "pixel_values": None}) == {}


def test_runs_and_grids_number_the_images() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]]).bool()
    assert image_rules.runs(mask, "image", {}, None).tolist() == [0, 0, 1, 2, 3]
    config = build("qwen2_vl").config
    grid = torch.tensor([[1, 2, 4], [1, 2, 2], [2, 2, 2]])
    assert image_rules.grids(mask, "image", {"image_grid_thw": grid}, config).tolist() == [
        0,
        0,
        1,
        2,
        2,
    ]


def test_merge_sizes_and_dropped_video_tokens() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]]).bool()
    grid, merge = torch.tensor([[2, 2, 2], [1, 4, 4]]), torch.tensor([1, 2])
    inputs = {"video_grid_thw": grid, "video_merge_sizes": merge}
    kept = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]).bool()
    found = image_rules.grids(mask, "video", {**inputs, "video_compression_mask": kept}, None)
    assert found.tolist() == [0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"video_grid_thw: means 12 video tokens, input_ids has 5"):
        image_rules.grids(mask, "video", inputs, None)


def test_equal_parts_of_pixels() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]]).bool()
    parts = image_rules.equal_parts
    assert parts(mask, "image", {"pixel_values": torch.zeros(2, 3, 8, 8)}, None).tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert parts(
        mask, "video", {"pixel_values_videos": torch.zeros(4, 3, 8, 8)}, None
    ).tolist() == [0, 1, 2, 3]
    assert parts(mask, "image", {"image_embeds": torch.zeros(4, 8)}, None).tolist() == [
        0,
        0,
        1,
        2,
    ]  # runs
    with pytest.raises(
        ValueError,
        match=r"pixel_values: has 3 images for 4 image tokens in input_ids, want as many",
    ):
        parts(mask, "image", {"pixel_values": torch.zeros(3, 3, 8, 8)}, None)


def test_tiles_of_zeros_are_padding() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    pixels = torch.zeros(2, 2, 3, 8, 8)
    pixels[0, 0], pixels[1, :, 0, 0, 0] = 1, -1  # one pixel is enough
    assert image_rules.tiles(mask, "image", {"pixel_values": pixels}, None).tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert (
        image_rules.tiles(mask, "image", {"pixel_values": 0 * pixels}, None).tolist() == [0] * 6
    )  # a black image
    assert image_rules.tiles(mask, "image", {"image_hidden_states": pixels}, None).tolist() == [
        0,
        0,
        1,
        1,
        1,
        1,
    ]  # runs
    with pytest.raises(
        ValueError, match=r"pixel_values: has 4 images for 6 image tokens in input_ids"
    ):
        image_rules.tiles(mask, "image", {"pixel_values": pixels + 1}, None)


def test_spatial_shapes_count_the_patches() -> None:
    config = build("lfm2_vl").config
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]]).bool()
    shapes = torch.tensor([[2, 4], [4, 2], [2, 2]])
    assert image_rules.shapes(mask, "image", {"spatial_shapes": shapes}, config).tolist() == [
        0,
        0,
        1,
        1,
        2,
    ]
    assert image_rules.shapes(mask, "image", {}, config).tolist() == [0, 0, 1, 2, 3]  # runs
    with pytest.raises(ValueError, match=r"spatial_shapes: means 4 image tokens, input_ids has 5"):
        image_rules.shapes(mask, "image", {"spatial_shapes": shapes[:2]}, config)


def test_image_tokens_stand_for_videos() -> None:
    parts = families.find_parts(build("glm4v"))
    ids = torch.tensor([[5, IMAGE, VIDEO]])
    for name, kind in (("pixel_values", "image"), ("pixel_values_videos", "video")):
        found = rows.placeholders(parts, {"input_ids": ids, name: torch.ones(1)})
        assert list(found) == [kind]
        assert found[kind].tolist() == [[False, True, False]]


def test_the_end_of_a_path_names_the_projector() -> None:
    aya = build("aya_vision").model
    assert families.find_parts(aya).projector is aya.multi_modal_projector.linear_1
    janus = build("janus").model
    aligner = janus.aligner
    del janus.aligner
    janus.aligner = aligner  # behind `generation_aligner`, whose name ends alike
    assert families.find_parts(janus).projector is aligner
