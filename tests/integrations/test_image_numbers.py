"""The number of the image or video of each visual token, by each rule of the table of families."""

from __future__ import annotations

import pytest
import torch

from pre_kernels.integrations import families, image_rules
from pre_kernels.integrations import tokens as rows

from .support.tiny.models import IMAGE, VIDEO, build


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
    numbers = image_rules.grids(mask, "image", {"image_grid_thw": grid}, config)
    assert numbers.tolist() == [0, 0, 1, 2, 2]


def test_merge_sizes_and_dropped_video_tokens() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]]).bool()
    grid, merge = torch.tensor([[2, 2, 2], [1, 4, 4]]), torch.tensor([1, 2])
    inputs = {"video_grid_thw": grid, "video_merge_sizes": merge}
    kept = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]).bool()
    found = image_rules.grids(mask, "video", {**inputs, "video_compression_mask": kept}, None)
    assert found.tolist() == [0, 1, 1, 1, 1]
    with pytest.raises(
        ValueError, match=r"video_grid_thw: stands for 12 video tokens, but input_ids has 5"
    ):
        image_rules.grids(mask, "video", inputs, None)


def test_equal_parts_of_pixels() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]]).bool()
    parts = image_rules.equal_parts
    numbers = parts(mask, "image", {"pixel_values": torch.zeros(2, 3, 8, 8)}, None)
    assert numbers.tolist() == [0, 0, 1, 1]
    numbers = parts(mask, "video", {"pixel_values_videos": torch.zeros(4, 3, 8, 8)}, None)
    assert numbers.tolist() == [0, 1, 2, 3]
    # Without these inputs, runs of tokens decide.
    numbers = parts(mask, "image", {"image_embeds": torch.zeros(4, 8)}, None)
    assert numbers.tolist() == [0, 0, 1, 2]
    with pytest.raises(
        ValueError,
        match=r"pixel_values: has 3 images for 4 image tokens in input_ids, want the same number",
    ):
        parts(mask, "image", {"pixel_values": torch.zeros(3, 3, 8, 8)}, None)


def test_tiles_of_zeros_are_padding() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    pixels = torch.zeros(2, 2, 3, 8, 8)
    pixels[0, 0] = 1
    pixels[1, :, 0, 0, 0] = -1  # one pixel is enough
    numbers = image_rules.tiles(mask, "image", {"pixel_values": pixels}, None)
    assert numbers.tolist() == [0, 0, 1, 1, 2, 2]
    # A black image is not padding.
    assert image_rules.tiles(mask, "image", {"pixel_values": 0 * pixels}, None).tolist() == [0] * 6
    # Without these inputs, runs of tokens decide.
    numbers = image_rules.tiles(mask, "image", {"image_hidden_states": pixels}, None)
    assert numbers.tolist() == [0, 0, 1, 1, 1, 1]
    with pytest.raises(
        ValueError, match=r"pixel_values: has 4 images for 6 image tokens in input_ids"
    ):
        image_rules.tiles(mask, "image", {"pixel_values": pixels + 1}, None)


def test_spatial_shapes_count_the_patches() -> None:
    config = build("lfm2_vl").config
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]]).bool()
    shapes = torch.tensor([[2, 4], [4, 2], [2, 2]])
    numbers = image_rules.shapes(mask, "image", {"spatial_shapes": shapes}, config)
    assert numbers.tolist() == [0, 0, 1, 1, 2]
    # Without these inputs, runs of tokens decide.
    assert image_rules.shapes(mask, "image", {}, config).tolist() == [0, 0, 1, 2, 3]
    with pytest.raises(
        ValueError, match=r"spatial_shapes: stands for 4 image tokens, but input_ids has 5"
    ):
        image_rules.shapes(mask, "image", {"spatial_shapes": shapes[:2]}, config)


def test_image_tokens_stand_for_videos() -> None:
    parts = families.find_parts(build("glm4v"))
    ids = torch.tensor([[5, IMAGE, VIDEO]])
    for name, kind in (("pixel_values", "image"), ("pixel_values_videos", "video")):
        found = rows.placeholders(parts, {"input_ids": ids, name: torch.ones(1)})
        assert list(found) == [kind]
        assert found[kind].tolist() == [[False, True, False]]
