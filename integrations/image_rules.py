"""The rules that `families.FAMILIES` names.

They say which image each visual token belongs to, which states a decoder layer works on, and from
which row of the projector's input each visual token is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model_config import Inputs, text_config


def runs(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """Every run of neighbouring visual tokens is an image. Images that touch cannot be told apart
    by this rule."""
    start = mask.clone()
    start[..., 1:] &= ~mask[..., :-1]
    numbers = start.flatten().cumsum(0)[mask.flatten()] - 1
    sizes = inputs.get("image_sizes") if kind == "image" else None
    if sizes is not None and int(start.sum()) != len(sizes):
        raise ValueError(
            f'level="image": found {int(start.sum())} runs of visual tokens for {len(sizes)} '
            "images, so some images touch; pass a mask_fn that returns the number of each token's "
            "image (1, 2, ...; 0 for text)"
        )
    return numbers


def equal_parts(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """Every image (video) has the same number of tokens. The first dimension of the pixels is the
    number of images (videos)."""
    names = ("pixel_values_videos",) if kind == "video" else ("pixel_values", "pixel_values_images")
    name, pixels = next(((n, p) for n in names if torch.is_tensor(p := inputs.get(n))), ("", None))
    if pixels is None or len(pixels) == 0:
        return runs(mask, kind, inputs, config)
    return _parts(len(pixels), mask, kind, name)


def runs_or_parts(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """Images are runs of visual tokens (`runs`), videos have equal parts (`equal_parts`)."""
    return (equal_parts if kind == "video" else runs)(mask, kind, inputs, config)


def patches(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """`image_sizes` (images, 2) in pixels gives the number of patches of each image (Pixtral).
    Without it every image has the same number (CLIP)."""
    sizes = inputs.get("image_sizes")
    if sizes is None:
        return equal_parts(mask, kind, inputs, config)
    side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    lengths = (torch.as_tensor(sizes, device=mask.device) // side).prod(-1)
    return _numbered(lengths, mask, kind, "image_sizes")


def tiles(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """Every tile is an image. `pixel_values` is (samples, tiles, channels, height, width); tiles of
    only zeros are padding."""
    pixels = inputs.get("pixel_values")
    if not torch.is_tensor(pixels):
        return runs(mask, kind, inputs, config)
    count = max(int(pixels.flatten(2).any(-1).sum()), 1)
    return _parts(count, mask, kind, "pixel_values")


def shapes(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """`spatial_shapes` (images, 2) counts rows and columns of patches; `downsample_factor`² patches
    make one token."""
    sizes = inputs.get("spatial_shapes")
    if sizes is None:
        return runs(mask, kind, inputs, config)
    lengths = (sizes.to(mask.device) // config.downsample_factor).prod(-1)
    return _numbered(lengths, mask, kind, "spatial_shapes")


def grids(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """`{image,video}_grid_thw` (images, 3) counts frames, rows and columns of patches;
    `spatial_merge_size`² patches make one token.

    If the forward gets `{image,video}_merge_sizes` (images,), each image has its own merge size.
    `video_compression_mask` drops tokens of videos.
    """
    grid = inputs.get(f"{kind}_grid_thw")
    if grid is None:
        return runs(mask, kind, inputs, config)
    merge = inputs.get(f"{kind}_merge_sizes")
    side = config.vision_config.spatial_merge_size if merge is None else merge.to(grid.device)
    lengths = (grid.prod(-1) // side**2).to(mask.device)
    kept = inputs.get("video_compression_mask") if kind == "video" else None
    return _numbered(lengths, mask, kind, f"{kind}_grid_thw", kept)


def _parts(count: int, mask: Tensor, kind: str, name: str) -> Tensor:
    total = int(mask.sum())
    if total % count:
        raise ValueError(
            f"{name}: has {count} {kind}s for {total} {kind} tokens in input_ids, want the same "
            f"number of tokens for each {kind}; truncation may have cut one: raise max_length"
        )
    return torch.arange(count, device=mask.device).repeat_interleave(total // count)


def _numbered(
    lengths: Tensor, mask: Tensor, kind: str, name: str, kept: Tensor | None = None
) -> Tensor:
    numbers = torch.arange(len(lengths), device=mask.device).repeat_interleave(lengths)
    if kept is not None:
        numbers = numbers[kept.to(mask.device)]
    if len(numbers) != int(mask.sum()):
        raise ValueError(
            f"{name}: stands for {len(numbers)} {kind} tokens, but input_ids has "
            f"{int(mask.sum())}; truncation may have cut one {kind}: raise the maximum length"
        )
    return numbers


def states_as_is(states: Tensor, config: Any) -> Tensor:
    """The states, unchanged: (B, T, d)."""
    return states


def states_altup(states: Tensor, config: Any) -> Tensor:
    """AltUp has several streams of states (P, B, T, d); the layers compute with the active one."""
    return states[text_config(config).altup_active_idx]


def rows_as_is(entered: list[Tensor], inputs: Inputs, config: Any) -> Tensor:
    """The projector's input has one row for each visual token."""
    return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in entered])


def rows_merged(entered: list[Tensor], inputs: Inputs, config: Any) -> Tensor:
    """The projector concatenates `spatial_merge_size`² neighbouring rows into one visual token."""
    cells = config.vision_config.spatial_merge_size**2
    return torch.cat([rows.reshape(-1, cells * rows.shape[-1]) for rows in entered])


def rows_merged_windows(entered: list[Tensor], inputs: Inputs, config: Any) -> Tensor:
    """Like `rows_merged`, but the tokens of an image come window by window. This puts them into the
    row-major order of the image."""
    rows = rows_merged(entered, inputs, config)
    pixels = {"image": "pixel_values", "video": "pixel_values_videos"}
    grid = torch.cat(
        [
            inputs[f"{kind}_grid_thw"]
            for kind, name in pixels.items()
            if inputs.get(name) is not None
        ]
    )
    vision = config.vision_config
    merge = vision.spatial_merge_size
    grid_of_tokens = grid.to(rows.device) // grid.new_tensor([1, merge, merge]).to(rows.device)
    side = vision.window_size // vision.patch_size // merge
    order = window_order(grid_of_tokens, side, len(rows))
    return torch.empty_like(rows).index_copy(0, order, rows)


def window_order(grid: Tensor, side: int, total: int) -> Tensor:
    """The row-major position (`total`,) of each token, where the tokens come in windows of `side`²
    tokens, one window after another.

    Args:
        grid: (images, 3): frames, rows and columns of tokens. The products add up to `total`.
        side: rows and columns of a window, in tokens.
        total: the number of tokens of all images.
    """
    images = torch.arange(len(grid), device=grid.device).repeat_interleave(
        grid.prod(-1), output_size=total
    )
    index = torch.arange(total, device=grid.device)
    start = grid.prod(-1).cumsum(0) - grid.prod(-1)
    _, height, width = grid[images].unbind(-1)
    place = (index - start[images]) % (height * width)
    # The sort key of a token is the index of the first token of its window.
    return (index - place // width % side * width - place % width % side).argsort(stable=True)
