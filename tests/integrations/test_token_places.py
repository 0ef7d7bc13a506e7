"""Whether each visual token depends on the pixels that `diagnose` assigns to it, in each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pre_kernels.diagnostics.run.geometry import UNMAPPED, cut, find_packing, token_grid
from pre_kernels.integrations.capture import Capture
from pre_kernels.integrations.families import find_parts

from .support.tiny.models import FAMILIES, Batch, batch, build

# Ends of the names of the parameters that mix patches of a vision tower.
MIXING = ("out_proj", "o_proj", "attn.proj", "projection_layer")
# Convolutions reach over the border of a patch. Chameleon's tokens are codes, which small changes
# do not change.
OVERLAPPING = {"got_ocr2"}
NOT_SEEN = {"chameleon", *UNMAPPED}
PACKED = {"llava_next", "llava_next_video", "llava_onevision"}
OTHER_LAYOUTS = {"lfm2_vl"}
SIZES = [(8, 16), (16, 8)]


def local(family: str) -> nn.Module:
    """A model whose vision tower looks at each patch separately."""
    model = build(family).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("vision", "visual", "encoder")) and any(
                end in name for end in MIXING
            ):
                parameter.zero_()
    return model


def one_image(family: str, size: tuple[int, int]) -> tuple[Batch, str]:
    data = batch(family, [[("text", 2), ("image", *size), ("text", 3)]])
    name = next(name for name in ("pixel_values", "pixel_values_images") if name in data.inputs)
    # The second tile is padding, which a single image does not have.
    if family in ("idefics3", "smolvlm"):
        data.inputs |= {
            key: data.inputs[key][:, :1]
            for key in (name, "pixel_attention_mask")
            if key in data.inputs
        }
    return data, name


def embeddings(model: nn.Module, data: Batch, **changed: Tensor) -> Tensor:
    """The visual tokens (tokens, width) that enter the language model."""
    parts = find_parts(model)
    states: list[Tensor] = []

    def finish(output: Any, seen: Any) -> Any:
        states.append(
            parts.family.hidden(seen.anchor(), parts.config)
            if seen.anchor().dim() == 4
            else seen.anchor()
        )
        return output

    capture = Capture(model, parts, (), lambda *_: True, finish)
    with torch.no_grad():
        model(**data.inputs | changed)
    capture.remove()
    return states[0][data.visual]


def changes(model: nn.Module, data: Batch, name: str, places: Tensor) -> Tensor:
    """The change of each token when the pixels of each row of `places` change, (rows, tokens)."""
    before = embeddings(model, data)
    pixels = data.inputs[name]
    rows = []
    for seed, place in enumerate(places):
        other = pixels.clone().flatten()
        other[place] = 2 * torch.randn(len(place), generator=torch.Generator().manual_seed(seed))
        rows.append(
            (embeddings(model, data, **{name: other.view(pixels.shape)}) - before).norm(dim=-1)
        )
    return torch.stack(rows)


def numbered(data: Batch, name: str) -> dict[str, Any]:
    pixels = data.inputs[name]
    return data.inputs | {name: torch.arange(pixels.numel()).view(pixels.shape)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NOT_SEEN - PACKED - OTHER_LAYOUTS))
def test_a_token_depends_on_its_own_pixels(family: str, size: tuple[int, int]) -> None:
    model = local(family)
    assert find_packing(model) is None
    data, name = one_image(family, size)
    tokens = int(data.visual.sum())
    found = changes(model, data, name, cut(numbered(data, name), tokens, family).flatten(1))
    if family in OVERLAPPING:
        assert found.argmax(1).tolist() == list(range(tokens))
    else:
        assert torch.equal(found > 1e-4, torch.eye(tokens, dtype=torch.bool))
        assert (found - found.diagonal().diag()).max() == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() & PACKED))
def test_a_packed_token_depends_on_the_tile_tokens_it_is_made_of(
    family: str, size: tuple[int, int]
) -> None:
    model = local(family)
    data, name = one_image(family, size)
    packing = find_packing(model)
    assert packing is not None
    tiles = {name: numbered(data, name)[name][0]}
    number = len(tiles[name])
    total = number * packing.per_tile
    effects = changes(model, data, name, cut(tiles, total, family).flatten(1))
    made = packing.pack(
        torch.eye(total).view(number, packing.per_tile, total), data.inputs["image_sizes"]
    )
    assert torch.equal(effects > 1e-4, made.mT > 0)
    assert (made.sum(1) == 0).sum() >= 2  # the ends of lines


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() & ({*UNMAPPED} | PACKED | OTHER_LAYOUTS)))
def test_families_whose_tokens_are_no_grid(family: str) -> None:
    for size in SIZES:
        data, _ = one_image(family, size)
        assert token_grid(data.inputs, int(data.visual.sum()), family) is None
