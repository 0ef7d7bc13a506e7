"""EncoderAnchor: the features of a frozen encoder on the grid of each image's visual tokens."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from pre_kernels.integrations import EncoderAnchor, apply_pre

from .support.by_hand import assert_same_gradients, expected_gradients, gradients
from .support.tiny.models import FAMILIES, batch, build

IMAGES = [
    [("text", 2), ("image", 8, 16), ("text", 3), ("image", 8, 8), ("text", 4)],
    [("image", 16, 12), ("text", 5)],
]
CLIP = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.25, 0.27]}
SAME = {"image_mean": None, "image_std": None}


def dino() -> nn.Module:
    torch.manual_seed(5)
    config = Dinov2Config(
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
    )
    return Dinov2Model(config)


class Pooled(nn.Module):
    """An encoder without parameters: the mean colour of each patch, after a class token with a
    large value."""

    def __init__(self, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = F.avg_pool2d(images, self.patch).flatten(2).transpose(1, 2)
        return torch.cat([torch.full_like(tokens[:, :1], 99.0), tokens], 1)


def patchify(image: torch.Tensor) -> torch.Tensor:
    """(patches, 24), cut like Qwen-VL's processor cuts an image (3, H, W): patches of 2², in blocks
    of 2², each twice in time."""
    rows = []
    for top in range(0, image.shape[1], 4):
        for left in range(0, image.shape[2], 4):
            for y in (top, top + 2):
                for x in (left, left + 2):
                    patch = image[:, y : y + 2, x : x + 2]
                    rows.append(torch.stack([patch, patch], 1).flatten())
    return torch.stack(rows)


def pictures(family: str, data: Any) -> list[torch.Tensor]:
    """Random images (3, H, W), which become the pixels of the batch."""
    if family == "llava":
        return list(data.inputs["pixel_values"])
    generator = torch.Generator().manual_seed(4)
    grid = data.inputs["image_grid_thw"].tolist()
    images = [torch.randn(3, 2 * h, 2 * w, generator=generator) for _, h, w in grid]
    data.inputs["pixel_values"] = torch.cat([patchify(image) for image in images])
    return images


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_training_towards_an_encoder(family: str) -> None:
    data = batch(family, IMAGES)
    images = pictures(family, data)
    encoder = dino().eval()
    target = []
    for image, length in zip(images, data.lengths, strict=True):
        colors = (
            image * torch.tensor(CLIP["image_std"])[:, None, None]
            + torch.tensor(CLIP["image_mean"])[:, None, None]
        )
        colors = (colors - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
            [0.229, 0.224, 0.225]
        )[:, None, None]
        colors = F.interpolate(colors[None], (12, 12), mode="bilinear", antialias=True)
        with torch.no_grad():
            features = encoder(colors).last_hidden_state[0, 1:].T.reshape(1, 20, 3, 3)
        height = 2 if family == "llava" else image.shape[1] // 4
        tokens = F.interpolate(
            features, (height, length // height), mode="bilinear", antialias=True
        )
        target += [tokens[0, :, y, x] for y in range(height) for x in range(length // height)]

    model = build(family)
    handle = apply_pre(model, anchor=EncoderAnchor(dino(), model, **CLIP))
    assert handle.head.out_dim == 20
    loss = model(**data.inputs).loss
    loss.backward()
    plain = build(family)
    wanted_loss, wanted = expected_gradients(
        plain, family, data, handle.head, [2], anchor=torch.stack(target)
    )
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)


@pytest.mark.parametrize("mode", ["bilinear", "area"])
def test_a_token_gets_the_features_of_its_own_place(mode: str) -> None:
    """Images whose colours encode the position: (row, column, number of the image)."""
    data = batch("qwen2_5_vl", IMAGES)
    places = []
    for number, (_, h, w) in enumerate(data.inputs["image_grid_thw"].tolist()):
        y, x = torch.meshgrid(torch.arange(2 * h) / 4, torch.arange(2 * w) / 4, indexing="ij")
        places.append(torch.stack([y, x, torch.full_like(y, number)]))
    data.inputs["pixel_values"] = torch.cat([patchify(place) for place in places])
    anchor = EncoderAnchor(
        Pooled(),
        build("qwen2_5_vl"),
        **SAME,
        size=48,
        mode=mode,
        anchor_dim=3,
    )
    features = anchor(data.inputs, data.visual)
    wanted = [
        [y + 0.375, x + 0.375, n]
        for n, place in enumerate(places)
        for y in range(place.shape[1] // 4)
        for x in range(place.shape[2] // 4)
    ]
    # It cannot be closer, because resizing repeats the pixels at the borders.
    torch.testing.assert_close(features, torch.tensor(wanted), atol=0.13, rtol=0)


@pytest.mark.parametrize(
    "family", [f for f in ("vipllava", "internvl", "gemma3", "paligemma") if f in FAMILIES]
)
def test_square_images_of_other_families(family: str) -> None:
    """Colours encode the position: (row, column, number of the image or tile)."""
    data = batch(family)
    height, width = data.inputs["pixel_values"].shape[2:]
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    images = len(data.inputs["pixel_values"])
    data.inputs["pixel_values"] = torch.stack(
        [torch.stack([y, x, torch.full_like(y, n)]) for n in range(images)]
    )
    anchor = EncoderAnchor(Pooled(1), build(family), **SAME, size=height, mode="area", anchor_dim=3)
    features = anchor(data.inputs, data.visual).view(images, -1, 3)
    side = int(features.shape[1] ** 0.5)
    # The distance from the first pixel of a token to its middle.
    half = (height / side - 1) / 2 / height
    wanted = [
        [[i / side + half, j / side + half, n] for i in range(side) for j in range(side)]
        for n in range(images)
    ]
    torch.testing.assert_close(features, torch.tensor(wanted))


def test_masked_dummy_images_have_no_anchor() -> None:
    data = batch("llava", [[("image", 8, 8), ("text", 4)]] * 3)
    anchor = EncoderAnchor(Pooled(), build("llava"), **SAME, size=8, anchor_dim=3)
    whole = anchor(data.inputs, data.visual)
    rows = data.visual.clone()
    rows[1] = False
    assert torch.equal(anchor(data.inputs, rows), torch.cat([whole[:4], whole[8:]]))


def test_images_for_the_encoder_alone() -> None:
    """Another argument of the forward has the images, in the encoder's own size and
    normalisation."""
    data = batch("qwen2_5_vl", IMAGES)
    images = torch.randn(3, 3, 16, 16)
    anchor = EncoderAnchor(
        Pooled(), build("qwen2_5_vl"), **SAME, size=16, pixels="own", mode="area", anchor_dim=3
    )
    found = anchor({**data.inputs, "own": images}, data.visual)
    wanted = F.adaptive_avg_pool2d(images[:1], (2, 4)).flatten(2)[0].T
    torch.testing.assert_close(found[:8], wanted)


def test_the_encoder_is_no_part_of_the_model() -> None:
    model = build("llava")
    data = batch("llava")
    plain = copy.deepcopy(model)
    encoder = dino()
    before = copy.deepcopy(encoder.state_dict())
    handle = apply_pre(model, anchor=EncoderAnchor(encoder, model, **CLIP))
    names = [name for name in model.state_dict() if not name.startswith("pre_head.")]
    assert names == list(plain.state_dict())
    assert len(list(model.parameters())) == len(list(plain.parameters())) + 4
    assert all(module is not encoder for module in model.modules())
    encoder.train()
    model.double().float().train()(**data.inputs).loss.backward()
    assert not encoder.training
    assert all(not p.requires_grad and p.grad is None for p in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    twin = copy.deepcopy(model)
    assert twin(**data.inputs).loss == model(**data.inputs).loss
    assert handle._objective.targets[0].anchor.encoder is encoder
    handle.remove()


def test_an_encoder_in_half_precision() -> None:
    model = build("llava")
    data = batch("llava")
    found = EncoderAnchor(dino().half(), model, **CLIP)(data.inputs, data.visual)
    wanted = EncoderAnchor(dino(), model, **CLIP)(data.inputs, data.visual)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


BAD = [
    ({"encoder": "dino"}, TypeError, "encoder: got str"),
    ({"model": nn.Linear(2, 2)}, TypeError, "model: got Linear without .config"),
    ({"image_std": None}, ValueError, "image_mean, image_std: got one of them"),
    ({"image_mean": [0.5]}, ValueError, r"image_mean: got \[0.5\], want three numbers"),
    ({"image_std": [0.5, 0, 1]}, ValueError, "image_std: got .* each > 0"),
    ({"encoder_mean": 0.5}, ValueError, "encoder_mean: got 0.5"),
    ({"size": 0}, ValueError, "size: got 0"),
    ({"encoder": Pooled(), "anchor_dim": 3}, TypeError, "size: got None"),
    ({"encoder": Pooled(), "size": 8}, TypeError, "anchor_dim: got None"),
    ({"mode": "nearest"}, ValueError, "mode: got 'nearest', want one of 'bilinear', 'area'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_argument(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EncoderAnchor(**({"encoder": dino(), "model": build("llava"), **CLIP} | options))


def test_an_encoder_inside_the_model() -> None:
    model = build("llava")
    with pytest.raises(ValueError, match=r"encoder: got a module of the model"):
        EncoderAnchor(model.model.vision_tower, model, **CLIP)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_with_newline_rows(family: str) -> None:
    with pytest.raises(ValueError, match=r"cuts images into tiles and adds newline rows"):
        EncoderAnchor(dino(), build(family), **CLIP)


UNFIT = [
    (
        "llava",
        {"pixel_values": None},
        TypeError,
        "pixel_values is NoneType, want a floating point tensor",
    ),
    (
        "llava",
        {"pixel_values": torch.zeros(2, 3, 8, 8)},
        ValueError,
        "got 12 visual tokens for 2 images, want a square number of tokens for each",
    ),
    (
        "llava",
        {"pixel_values": torch.zeros(1, 3, 3, 8, 8)},
        ValueError,
        r"has shape \(1, 3, 3, 8, 8\), want images",
    ),
    ("llava", {"image_sizes": torch.ones(3, 2)}, ValueError, "the batch has image_sizes"),
    ("llava", {"pixel_values_videos": torch.ones(1)}, ValueError, "the batch has videos"),
    (
        "qwen2_vl",
        {"image_grid_thw": torch.tensor([[1, 4, 4]])},
        ValueError,
        "does not match the 20 visual tokens of the batch",
    ),
    (
        "qwen2_vl",
        {"image_merge_sizes": torch.ones(3)},
        ValueError,
        "merges the patches of each image by a factor",
    ),
    (
        "qwen2_vl",
        {"pixel_values": torch.zeros(80, 23)},
        ValueError,
        "a patch has 23 values, want 3 · 2 · 2²",
    ),
]


@pytest.mark.parametrize(
    ("family", "inputs", "error", "message"), UNFIT, ids=[m for *_, m in UNFIT]
)
def test_unfit_batch(
    family: str, inputs: dict[str, Any], error: type[Exception], message: str
) -> None:
    data = batch(family)
    anchor = EncoderAnchor(dino(), build(family), **CLIP)
    with pytest.raises(error, match=message):
        anchor({**data.inputs, **inputs}, data.visual)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            torch.zeros(3, 10, 21),
            r"encoder: returned shape \(3, 10, 21\) for 3 images, want \(3, tokens, 20\)",
        ),
        (torch.zeros(3, 20), r"encoder: returned shape \(3, 20\)"),
        (SimpleNamespace(logits=1), "encoder: returned SimpleNamespace"),
    ],
)
def test_unfit_encoder(output: Any, message: str) -> None:
    class Returns(nn.Module):
        def forward(self, images: torch.Tensor) -> Any:
            return output

    anchor = EncoderAnchor(Returns(), build("llava"), **CLIP, size=8, anchor_dim=20)
    data = batch("llava")
    with pytest.raises(ValueError, match=message):
        anchor(data.inputs, data.visual)
