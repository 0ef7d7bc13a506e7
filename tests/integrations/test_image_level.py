"""The image level: one term for each image or video, also if they touch."""

from __future__ import annotations

import pytest
import torch

from pre_kernels.integrations import apply_pre, families, image_rules

from .support.attached import every_family, run
from .support.by_hand import assert_same_gradients, expected_gradients
from .support.tiny.models import FAMILIES, VIDEOS, batch, build


@every_family
def test_image_level_is_the_mean_over_each_image(family: str) -> None:
    loss, found, handle, _ = run(family, level="image", layer=3)
    wanted_loss, wanted = expected_gradients(
        build(family), family, batch(family), handle.head, [3], level="image"
    )
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(found, wanted)
    assert handle.metrics()["pre_rows"] == len(batch(family).lengths) == 3


TOUCHING = [[("text", 2), ("image", 8, 8), ("image", 8, 16), ("text", 4)]]


NEED_GAPS = (image_rules.runs, image_rules.runs_or_parts)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if families.FAMILIES[f].images not in NEED_GAPS]
)
def test_image_level_with_images_that_touch(family: str) -> None:
    data = batch(family, TOUCHING)
    loss, _, handle, _ = run(family, data, level="image")
    wanted, _ = expected_gradients(build(family), family, data, handle.head, [2], level="image")
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("family", ["llava_next", "llava_next_video", "llava_onevision"])
def test_image_level_asks_for_help_where_images_touch(family: str) -> None:
    data = batch(family, TOUCHING)
    if family == "llava_onevision":
        data.inputs["batch_num_images"] = torch.tensor([1, 1])
    model = build(family)
    apply_pre(model, level="image")
    with pytest.raises(ValueError, match=r"2 images, so some images touch; pass a mask_fn"):
        model(**data.inputs)

    numbers = data.visual.long()
    numbers[data.visual] = torch.repeat_interleave(torch.tensor([1, 2]), torch.tensor(data.lengths))
    loss, _, handle, _ = run(family, data, level="image", mask_fn=lambda inputs: numbers)
    wanted, _ = expected_gradients(build(family), family, data, handle.head, [2], level="image")
    torch.testing.assert_close(loss, wanted)


with_videos = pytest.mark.parametrize("family", [f for f, tiny in FAMILIES.items() if tiny.videos])


@with_videos
def test_image_level_with_videos_that_touch(family: str) -> None:
    data = batch(family, [[("text", 2), ("video", 4, 8, 8), ("video", 4, 8, 8), ("text", 4)]])
    loss, _, handle, _ = run(family, data, level="image")
    wanted, _ = expected_gradients(build(family), family, data, handle.head, [2], level="image")
    torch.testing.assert_close(loss, wanted)
    assert handle.metrics()["pre_rows"] == 2


@with_videos
@pytest.mark.parametrize("level", ["patch", "image"])
def test_videos_beside_images(family: str, level: str) -> None:
    data = batch(family, FAMILIES[family].clips or VIDEOS)
    loss, found, handle, _ = run(family, data, level=level)
    wanted_loss, wanted = expected_gradients(
        build(family), family, data, handle.head, [2], level=level
    )
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(found, wanted)
    assert handle.metrics()["pre_rows"] == (3 if level == "image" else int(data.visual.sum()))
