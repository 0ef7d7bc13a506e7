"""Which object each visual token shows, found with the model's own image processor."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import optional

Process = Callable[..., Mapping[str, Any]]
PIXELS = ("pixel_values", "pixel_values_images")
# For each config.model_type, why the number and order of its tokens say nothing about positions.
UNMAPPED = {
    "aria": "a resampler makes its tokens",
    "emu3": "ends of lines are among its tokens",
    "idefics2": "a resampler makes its tokens",
}
NO_MASKS = "masks cannot be used with this model (everything else in a report needs no masks)"
# The blue value of each pixel in a map of objects. No processor pads with it, so pixels without it
# are padding.
MARK = 200


@dataclass(frozen=True)
class Packing:
    """How a model like LLaVA-NeXT makes the tokens of an image from the tokens of its tiles. It
    removes padding, and adds a token at the end of each line. LLaVA-OneVision also rescales the
    rest.

    Attributes:
        per_tile: the number of tokens of each tile.
        pack: (tiles, per_tile, width), `image_sizes` → (tokens, width). Tokens that show no part of
            the image are zeros.
    """

    per_tile: int
    pack: Callable[[Tensor, Tensor], Tensor]


def find_packing(model: nn.Module) -> Packing | None:
    """The packing of a transformers model, from its own `pack_image_features`. None if it has no
    such method."""
    able = [module for module in model.modules() if hasattr(type(module), "pack_image_features")]
    if not able:
        return None
    # The innermost module is used because LLaVA-OneVision's outer model passes an argument that the
    # inner one does not accept.
    make: Any = able[-1].pack_image_features
    config: Any = able[-1].config
    names = ("vision_feature_select_strategy", "vision_aspect_ratio")
    options = {
        name: getattr(config, name) for name in names if name in inspect.signature(make).parameters
    }

    def pack(tiles: Tensor, sizes: Tensor) -> Tensor:
        packed, _ = make([tiles], sizes, image_newline=tiles.new_zeros(tiles.shape[-1]), **options)
        return packed if torch.is_tensor(packed) else packed[0]

    return Packing((config.vision_config.image_size // config.vision_config.patch_size) ** 2, pack)


def token_grid(
    pixel_inputs: Mapping[str, Any], tokens: int, model_type: str
) -> tuple[int, int] | None:
    """(rows, columns) of an image's visual tokens, for `LayerReport`. None if they are not one
    grid.

    The arguments are as for `token_objects`.
    """
    try:
        tiles, grid = _layout(pixel_inputs, tokens, model_type)
    except ValueError:
        return None
    return grid if tiles == 1 else None


def token_objects(
    process: Process,
    objects: np.ndarray,
    pixel_inputs: Mapping[str, Any],
    tokens: int,
    model_type: str,
    coverage: float = 0.5,
    packing: Packing | None = None,
) -> Tensor:
    """The visual tokens of each object of one image, bool (objects, tokens) on the CPU, for
    `LayerReport`.

    The map of objects is processed like the image. It is drawn as images, each with two bits of the
    object numbers, which `process` resizes, crops, pads and tiles. A token belongs to the object
    that covers most of the token's pixels, if its share is at least `coverage`, and otherwise to
    none. Padding belongs to none. If an image is cut into tiles with a thumbnail of the whole, an
    object has tokens in both. An object without tokens has a row of False.

    Layouts that can be mapped: (tiles, 3, height, width), with each tile a grid of square tokens in
    reading order; the same for one sample, (1, tiles, 3, height, width); rows of patches with
    `image_grid_thw`, where merge_size² patches make a token.

    Args:
        process: the model's image processor, or a function that calls the processor as it was
            called for the image. It is called as process(image, return_tensors="pt",
            do_rescale=False, do_normalize=False).
        objects: uint8 (height, width) of the upright image: 1..k for its objects, 0 elsewhere.
        pixel_inputs: the output of the processor for one image: `pixel_values` and, if present,
            `image_grid_thw` and `image_sizes`.
        tokens: the number of visual tokens of the image in the model.
        model_type: the model_type of the model's config.
        coverage: the smallest share of a token's pixels, above 0, at most 1.
        packing: `find_packing(model)`. Without it, tokens of LLaVA-NeXT and LLaVA-OneVision have
            none of the layouts above.

    Raises:
        ValueError: the tokens of the model are not positions in the image, or have none of the
            layouts above. The message names the argument.
    """
    if (
        not isinstance(objects, np.ndarray)
        or objects.dtype != np.uint8
        or objects.ndim != 2
        or not objects.size
    ):
        got = (
            f"{objects.dtype} {objects.shape}"
            if isinstance(objects, np.ndarray)
            else type(objects).__name__
        )
        raise ValueError(f"objects: got {got}, want an array of uint8 (height, width), not empty")
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage: got {coverage}, want a number above 0, at most 1")
    count = max(int(objects.max()), 1)
    if packing is None:
        covered = _covered(process, objects, pixel_inputs, tokens, model_type, count)
    else:
        covered = _packed(process, objects, pixel_inputs, model_type, count, packing)
        if len(covered) != tokens:
            raise ValueError(
                f"tokens: got {tokens}, want {len(covered)}, which the model makes of such an image"
            )
    first = torch.arange(count) == covered.argmax(1, keepdim=True)
    return (first & (covered >= coverage)).mT[: int(objects.max())]


def _packed(
    process: Process,
    objects: np.ndarray,
    pixel_inputs: Mapping[str, Any],
    model_type: str,
    count: int,
    packing: Packing,
) -> Tensor:
    """The same as `_covered` for the tokens that a model makes from the tokens of tiles."""

    def tiles(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"pixel_values": _pixels(inputs).flatten(0, -4)}

    sizes = pixel_inputs.get("image_sizes")
    if sizes is None:
        raise ValueError(
            f"pixel_inputs: got {', '.join(pixel_inputs)}, want image_sizes too, to pack tokens by"
        )
    whole = tiles(pixel_inputs)
    number = len(whole["pixel_values"])
    tokens = number * packing.per_tile
    covered = _covered(
        lambda *a, **o: tiles(process(*a, **o)), objects, whole, tokens, model_type, count
    )
    return packing.pack(covered.unflatten(0, (number, packing.per_tile)), sizes.cpu())


def _covered(
    process: Process,
    objects: np.ndarray,
    pixel_inputs: Mapping[str, Any],
    tokens: int,
    model_type: str,
    count: int,
) -> Tensor:
    """The share of each token's pixels that each object covers, (tokens, count), float64."""
    numbers = _numbers(process, objects, pixel_inputs, tokens, model_type)
    place = torch.arange(tokens)[:, None] * (count + 1)
    votes = torch.bincount((place + numbers).flatten(), minlength=tokens * (count + 1)).view(
        tokens, count + 1
    )
    return votes[:, 1:].double() / numbers.shape[1]


def _numbers(
    process: Process,
    objects: np.ndarray,
    pixel_inputs: Mapping[str, Any],
    tokens: int,
    model_type: str,
) -> Tensor:
    """The number of the object at each pixel of each token, (tokens, pixels), 0 in padding."""
    from PIL import Image

    layout = _layout(pixel_inputs, tokens, model_type)
    count = int(objects.max())
    numbers = torch.zeros((), dtype=torch.long)
    for bit in range(0, max(count.bit_length(), 1), 2):
        # Interpolation between two objects changes all their differing bits at the halfway point,
        # so it never produces a third object.
        planes = [
            (objects >> bit & 1) * 255,
            (objects >> bit + 1 & 1) * 255,
            np.full_like(objects, MARK),
        ]
        drawn = Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))
        processed = process(drawn, return_tensors="pt", do_rescale=False, do_normalize=False)
        want = _pixels(pixel_inputs).shape
        got = _pixels(processed).shape
        if got != want or _layout(processed, tokens, model_type) != layout:
            raise ValueError(
                f"process: made pixels of shape {tuple(got)} from the objects and {tuple(want)} "
                "from the image, want the same shape: objects of the image's size, and a processor "
                "with the same settings"
            )
        low, high, mark = cut(processed, tokens, model_type).float().unbind(1)
        inside = (mark - MARK).abs() < 8
        if not inside.any():
            raise ValueError(
                f"process: left no pixel's blue at {MARK}, want a processor that leaves colours "
                "alone when do_rescale and do_normalize are False"
            )
        numbers = numbers + inside * (((low > 127) << bit) + ((high > 127) << bit + 1))
    return numbers * (numbers <= count)


def cut(pixel_inputs: Mapping[str, Any], tokens: int, model_type: str) -> Tensor:
    """The pixels of each token, (tokens, 3, pixels). Arguments and errors are as for
    `token_objects`."""
    _, (rows, columns) = _layout(pixel_inputs, tokens, model_type)
    pixels = _pixels(pixel_inputs)
    if "image_grid_thw" in pixel_inputs:
        merged: Tensor = optional("einops").rearrange(
            pixels, "(tokens patches) (c n) -> tokens c (patches n)", tokens=tokens, c=3
        )
        return merged
    tiles = pixels.flatten(0, -4)
    side = _side(tiles, tokens // len(tiles))
    # Pixels left over at the edges belong to no patch.
    tiles = tiles[..., : rows * side, : columns * side]
    patches: Tensor = optional("einops").rearrange(
        tiles, "n c (row y) (column x) -> (n row column) c (y x)", y=side, x=side
    )
    return patches


def _pixels(inputs: Mapping[str, Any]) -> Tensor:
    pixels: Tensor | None = next(
        (inputs[name] for name in PIXELS if torch.is_tensor(inputs.get(name))), None
    )
    if pixels is None:
        raise ValueError(
            f"pixel_inputs: got {', '.join(inputs) or 'nothing'}, want {PIXELS[0]}; {NO_MASKS}"
        )
    return pixels.cpu()


def _layout(inputs: Mapping[str, Any], tokens: int, model_type: str) -> tuple[int, tuple[int, int]]:
    """The number of tiles, and the rows and columns of tokens in each."""
    if reason := UNMAPPED.get(model_type):
        raise ValueError(f"model_type: got {model_type!r}, and {reason}: {NO_MASKS}")
    pixels = _pixels(inputs)
    what = f"got {tokens} for pixels of shape {tuple(pixels.shape)}"
    grids = inputs.get("image_grid_thw")
    if grids is not None:
        frames, height, width = (grids[0] if len(grids) == 1 else grids.sum(0)).tolist()
        side = math.isqrt(height * width // max(tokens, 1))
        if len(grids) != 1 or frames != 1 or not side or height % side or width % side:
            side = 0
        if pixels.dim() != 2 or not side or side**2 * tokens != height * width:
            raise ValueError(
                f"tokens: {what} and image_grid_thw {grids.tolist()}, want the tokens of one "
                f"image, each made from a square of patches: {NO_MASKS}"
            )
        return 1, (height // side, width // side)

    channels = pixels.dim() in (4, 5) and pixels.shape[-3] == 3
    # Five dimensions are the tiles of one sample. LLaVA-NeXT has a different layout: it removes the
    # tokens of padding, and adds a token at the end of each line.
    if not channels or (pixels.dim() == 5 and (len(pixels) != 1 or "image_sizes" in inputs)):
        raise ValueError(f"tokens: {what}, want tiles that all have the same tokens: {NO_MASKS}")
    tiles = pixels.flatten(0, -4)
    side = _side(tiles, tokens // len(tiles))
    if tokens % len(tiles) or not side:
        raise ValueError(f"tokens: {what}, want {len(tiles)} grids of squares: {NO_MASKS}")
    return len(tiles), (tiles.shape[2] // side, tiles.shape[3] // side)


def _side(tiles: Tensor, tokens: int) -> int:
    """The side in pixels of a square such that a tile holds `tokens` of them. 0 if there is
    none."""
    height, width = tiles.shape[2:]
    sides = range(min(height, width), 0, -1)
    return next((side for side in sides if (height // side) * (width // side) == tokens), 0)
