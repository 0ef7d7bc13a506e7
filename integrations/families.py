"""Where a vision-language model keeps what PRe needs: one generic rule, and a table of what it
cannot find."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .llava import Merge, check_merge, is_original
from .notices import Notices

Inputs = Mapping[str, Any]
DESCENT = ("text_model", "language_model", "model", "decoder")


def runs(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """Every run of neighbouring visual tokens is an image, so images that touch must be told apart
    in another way."""
    start = mask.clone()
    start[..., 1:] &= ~mask[..., :-1]
    numbers = start.flatten().cumsum(0)[mask.flatten()] - 1
    sizes = inputs.get("image_sizes") if kind == "image" else None
    if sizes is not None and int(start.sum()) != len(sizes):
        raise ValueError(
            f'level="image": found {int(start.sum())} runs of visual tokens for {len(sizes)} images, so some images '
            "touch; pass a mask_fn that returns the number of each token's image (1, 2, ...; 0 for text)"
        )
    return numbers


def equal_parts(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """Every image (video) has the same number of tokens: the first dimension of its pixels says how
    many there are."""
    names = ("pixel_values_videos",) if kind == "video" else ("pixel_values", "pixel_values_images")
    name, pixels = next(((n, p) for n in names if torch.is_tensor(p := inputs.get(n))), ("", None))
    if pixels is None or len(pixels) == 0:
        return runs(mask, kind, inputs, config)
    return _parts(len(pixels), mask, kind, name)


def runs_or_parts(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """Images as runs of visual tokens, videos as equal parts."""
    return (equal_parts if kind == "video" else runs)(mask, kind, inputs, config)


def patches(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """`image_sizes` (images, 2) in pixels, cut into patches (Pixtral); without it equal parts
    (CLIP)."""
    sizes = inputs.get("image_sizes")
    if sizes is None:
        return equal_parts(mask, kind, inputs, config)
    side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    lengths = (torch.as_tensor(sizes, device=mask.device) // side).prod(-1)
    return _numbered(lengths, mask, kind, "image_sizes")


def tiles(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """Every tile is an image: `pixel_values` (samples, tiles, channels, height, width), some all
    zeros as padding."""
    pixels = inputs.get("pixel_values")
    if not torch.is_tensor(pixels):
        return runs(mask, kind, inputs, config)
    count = max(int(pixels.flatten(2).any(-1).sum()), 1)
    return _parts(count, mask, kind, "pixel_values")


def shapes(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """`spatial_shapes` (images, 2) counts the patches; `downsample_factor`² of them make one
    token."""
    sizes = inputs.get("spatial_shapes")
    if sizes is None:
        return runs(mask, kind, inputs, config)
    lengths = (sizes.to(mask.device) // config.downsample_factor).prod(-1)
    return _numbered(lengths, mask, kind, "spatial_shapes")


def grids(mask: Tensor, kind: str, inputs: Inputs, config: Any) -> Tensor:
    """`{image,video}_grid_thw` (images, 3) counts the patches; `spatial_merge_size`² of them make
    one token.

    With `{image,video}_merge_sizes` (images,) it is each image's own; `video_compression_mask`
    drops tokens of videos.
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
            f"{name}: has {count} {kind}s for {total} {kind} tokens in input_ids, want as many for each"
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
            f"{name}: means {len(numbers)} {kind} tokens, input_ids has {int(mask.sum())}"
        )
    return numbers


def same(states: Tensor, config: Any) -> Tensor:
    """The states as they are."""
    return states


def active(states: Tensor, config: Any) -> Tensor:
    """AltUp: of the predictions (P, B, T, d) the one that the layers compute with."""
    return states[text_config(config).altup_active_idx]


def joined(entered: list[Tensor], inputs: Inputs, config: Any) -> Tensor:
    """The projector's input has one row for each visual token."""
    return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in entered])


def merged(entered: list[Tensor], inputs: Inputs, config: Any) -> Tensor:
    """The projector concatenates `spatial_merge_size`² neighbouring rows to one visual token."""
    cells = config.vision_config.spatial_merge_size**2
    return torch.cat([rows.reshape(-1, cells * rows.shape[-1]) for rows in entered])


def merged_windows(entered: list[Tensor], inputs: Inputs, config: Any) -> Tensor:
    """As `merged`, but an image's tokens come window by window; this puts them back in the order of
    the image."""
    rows = merged(entered, inputs, config)
    pixels = {"image": "pixel_values", "video": "pixel_values_videos"}
    grid = torch.cat(
        [
            inputs[f"{kind}_grid_thw"]
            for kind, name in pixels.items()
            if inputs.get(name) is not None
        ]
    )
    vision = config.vision_config
    order = window_order(
        grid.to(rows.device)
        // grid.new_tensor([1, vision.spatial_merge_size, vision.spatial_merge_size]).to(
            rows.device
        ),
        vision.window_size // vision.patch_size // vision.spatial_merge_size,
        len(rows),
    )
    return torch.empty_like(rows).index_copy(0, order, rows)


def window_order(grid: Tensor, side: int, total: int) -> Tensor:
    """The place (`total`,) in its image's row-major order of each token, windows of `side`² tokens
    one after another.

    Args:
        grid: (images, 3): frames, rows and columns of tokens; its product adds up to `total`.
    """
    images = torch.arange(len(grid), device=grid.device).repeat_interleave(
        grid.prod(-1), output_size=total
    )
    index = torch.arange(total, device=grid.device)
    start = grid.prod(-1).cumsum(0) - grid.prod(-1)
    _, height, width = grid[images].unbind(-1)
    place = (index - start[images]) % (height * width)
    # tokens of a window share its first token's index, and windows are in the order of those
    return (index - place // width % side * width - place % width % side).argsort(stable=True)


@dataclass(frozen=True)
class Family:
    """What differs between families; every default is the generic rule.

    Attributes:
        images: (mask (B, T) of one kind of visual token, "image" | "video", the forward's
            arguments, config) → the
            number (N,) of each visual token's image, counted from 0 in batch-major order; a video counts as an image,
            and so does each tile of an image where other tokens stand between the tiles.
        projector: end of the path of the module whose input rows are the visual tokens, for
            anchor="pre_projector"; or several, of which a model has one.
        projector_rows: (what entered it in each of its calls in a forward, the forward's arguments,
            config) → (M, z), a row for each visual token, all images' first and then all videos'.
        text: path of the text model, whose `.layers` are the decoder layers.
        image_inputs, video_inputs: arguments of the forward, one of which is there when the batch
            has images (videos).
        video_token: the kind of token that stands for a video, if not its own.
        hidden: (what a decoder layer is given or makes, config) → the states (B, T, d) that it
            works on.
        name: what people call it.
        since: the oldest transformers that has it, of those supported.
        videos: whether it has tokens of its own for videos.
    """

    images: Callable[[Tensor, str, Inputs, Any], Tensor] = runs
    projector: str | tuple[str, ...] | None = None
    text: str | None = None
    image_inputs: tuple[str, ...] = ("pixel_values", "image_embeds")
    video_inputs: tuple[str, ...] = ("pixel_values_videos", "video_embeds")
    video_token: str = "video"
    hidden: Callable[[Tensor, Any], Tensor] = same
    projector_rows: Callable[[list[Tensor], Inputs, Any], Tensor] = joined
    name: str = ""
    since: str = "4.57"
    videos: bool = False


GENERIC = Family()
IDEFICS = ("pixel_values", "image_hidden_states")
LLAVA_PROJECTOR = "multi_modal_projector"
FAMILIES = {  # by config.model_type
    "llava": Family(patches, LLAVA_PROJECTOR, name="LLaVA"),
    "llava_next": Family(name="LLaVA-NeXT"),
    "llava_next_video": Family(runs_or_parts, name="LLaVA-NeXT-Video", videos=True),
    "llava_onevision": Family(runs_or_parts, name="LLaVA-OneVision", videos=True),
    "vipllava": Family(equal_parts, LLAVA_PROJECTOR, name="VipLLaVA"),
    "qwen2_vl": Family(grids, "merger", projector_rows=merged, name="Qwen2-VL", videos=True),
    "qwen2_5_vl": Family(
        grids, "merger", projector_rows=merged_windows, name="Qwen2.5-VL", videos=True
    ),
    "qwen3_vl": Family(grids, "merger", projector_rows=merged, name="Qwen3-VL", videos=True),
    "qwen3_vl_moe": Family(
        grids, "merger", projector_rows=merged, name="Qwen3-VL-MoE", videos=True
    ),
    "qwen3_5": Family(
        grids, "merger", projector_rows=merged, name="Qwen3.5", since="5.2", videos=True
    ),
    "qwen3_5_moe": Family(
        grids, "merger", projector_rows=merged, name="Qwen3.5", since="5.2", videos=True
    ),
    # an image is several tiles, a frame of a video an image
    "internvl": Family(runs, LLAVA_PROJECTOR, name="InternVL"),
    # its projector pools patches, and so does Mistral3's: their input is not one row for a token
    "gemma3": Family(equal_parts, name="Gemma 3"),
    "paligemma": Family(equal_parts, LLAVA_PROJECTOR, name="PaliGemma"),
    "mistral3": Family(patches, name="Mistral 3 (Pixtral)"),
    "video_llava": Family(
        equal_parts,
        LLAVA_PROJECTOR,
        image_inputs=("pixel_values", "pixel_values_images", "image_embeds"),
        name="Video-LLaVA",
        videos=True,
    ),
    "video_llama_3": Family(grids, "projector", name="VideoLLaMA 3", since="5.0", videos=True),
    # a resampler stands between its patches and tokens, and so does one in Aria
    "idefics2": Family(tiles, image_inputs=IDEFICS, name="Idefics2"),
    "idefics3": Family(
        tiles, "connector.modality_projection", image_inputs=IDEFICS, name="Idefics3"
    ),
    "smolvlm": Family(tiles, "connector.modality_projection", image_inputs=IDEFICS, name="SmolVLM"),
    "glm4v": Family(grids, "merger", video_token="image", name="GLM-4V", videos=True),
    "glm4v_moe": Family(grids, "merger", video_token="image", name="GLM-4V", videos=True),
    "glm46v": Family(
        grids, "merger", video_token="image", name="GLM-4.6V", since="5.0", videos=True
    ),
    "llama4": Family(equal_parts, LLAVA_PROJECTOR, name="Llama 4"),
    # what comes before their first linear layer puts 2 x 2 patches together
    "cohere2_vision": Family(equal_parts, "multi_modal_projector.linear_1", name="Cohere2 Vision"),
    "aya_vision": Family(equal_parts, "multi_modal_projector.linear_1", name="Aya Vision"),
    "ovis2": Family(equal_parts, "head_linear", name="Ovis2"),
    "aria": Family(name="Aria"),
    "lfm2_vl": Family(shapes, name="LFM2-VL"),
    "got_ocr2": Family(name="GOT-OCR2"),
    "janus": Family(equal_parts, "aligner", name="Janus"),
    "deepseek_vl": Family(equal_parts, "aligner", name="DeepSeek-VL"),
    "deepseek_vl_hybrid": Family(equal_parts, "aligner", name="DeepSeek-VL"),
    "chameleon": Family(equal_parts, name="Chameleon"),
    "emu3": Family(name="Emu3"),
    "gemma3n": Family(equal_parts, hidden=active, name="Gemma 3n"),
}
ORIGINAL = Family(
    projector=("mm_projector", "connector"), name="the original LLaVA, LLaVA-NeXT and TinyLLaVA"
)


@dataclass
class Parts:
    """The parts of one model.

    `merge` finds the visual tokens in models of the original LLaVA code bases, `tokens` in others.
    """

    family: Family
    config: Any
    text: (
        nn.Module | None
    )  # None if it is the whole model, whose `inputs_embeds` are not yet merged with the images
    layers: nn.ModuleList
    projector: nn.Module | None
    merge: Merge | None = None
    notices: Notices = field(default_factory=Notices)

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """The token ids of each kind that stand for visual tokens, as the config has them now."""
        return {
            "image": _token_ids(self.config, "image"),
            "video": _token_ids(self.config, self.family.video_token),
        }


def find_parts(
    model: nn.Module,
    text_model: str | nn.Module | None = None,
    layers: str | nn.ModuleList | None = None,
) -> Parts:
    """The parts of `model` (unwrapped: no PEFT, DDP, ... around it); `text_model` and `layers` are
    not looked for.

    Raises:
        TypeError: if `text_model` is no module, or `layers` no ModuleList.
        ValueError: if there is no config, no decoder layers where they are looked for, or nothing
            at a path; if what was given is no part of the model.
    """
    config = getattr(model, "config", None)
    if config is None and layers is None:
        raise ValueError(
            f"model: {type(model).__name__} has no .config; want a Hugging Face vision-language model, or pass layers= "
            "(the ModuleList of the decoder's layers, or its path) and mask_fn="
        )
    config = SimpleNamespace() if config is None else config
    original = is_original(model)
    kind = getattr(config, "model_type", "").replace("-", "_")  # "lfm2-vl" in 4.57
    family = ORIGINAL if original else FAMILIES.get(kind, GENERIC)
    text: nn.Module | None = (
        None if text_model is None else _module(model, "text_model", text_model)[1]
    )
    if layers is None:
        text, found = _find_layers(model, config, family, text)
    else:
        path, module = _module(model, "layers", layers)
        if not isinstance(module, nn.ModuleList):
            raise TypeError(
                f"layers: got a {type(module).__name__}, want the ModuleList of the decoder's layers"
            )
        if not len(module):
            raise ValueError("layers: got an empty ModuleList, want that of the decoder's layers")
        found = module
        text = model.get_submodule(path.rpartition(".")[0]) if text is None else text
    ends = (family.projector,) if isinstance(family.projector, str) else family.projector or ()
    projector = next(
        (m for end in ends for n, m in model.named_modules() if f".{n}".endswith(f".{end}")), None
    )
    merge = Merge(model) if original else None
    return Parts(family, config, None if text is model else text, found, projector, merge)


def check_tokens(parts: Parts, model: nn.Module) -> None:
    """Raise a ValueError for a model in which visual tokens are not found without a mask_fn."""
    crossed = getattr(text_config(parts.config), "cross_attention_layers", None)
    if crossed:
        raise ValueError(
            f"model: the images of {type(model).__name__} enter by cross-attention (its config has "
            f"cross_attention_layers {crossed}), so they have no tokens in the decoder; want a model whose decoder has "
            "visual tokens, or pass mask_fn="
        )
    if parts.merge is not None:
        check_merge(model)
    elif not any(parts.tokens.values()):
        raise ValueError(
            f"model: {type(model).__name__}'s config names no visual tokens (looked for image_token_id, "
            "image_token_index, video_token_id, video_token_index); want a vision-language model. Of one whose code "
            "keeps the image token's id elsewhere, as InternVL's own chat code does, it is enough to set "
            "image_token_id to that id in config.json, or in model.config; or pass mask_fn="
        )


def text_config(config: Any) -> Any:
    """The part of a model's config that is the text model's: `get_text_config()`, `.text_config`,
    or all of it."""
    get = getattr(config, "get_text_config", None)
    return getattr(config, "text_config", config) if get is None else get()


def _module(model: nn.Module, name: str, given: Any) -> tuple[str, nn.Module]:
    """The path and the module that the argument `name` means."""
    if isinstance(given, str):
        try:
            return given, model.get_submodule(given)
        except AttributeError as error:
            raise ValueError(
                f"{name}: got {given!r}, which is no module of the model: {error}"
            ) from error
    if not isinstance(given, nn.Module):
        hint = "; numbers of layers go into layer=" if name == "layers" else ""
        raise TypeError(
            f"{name}: got {type(given).__name__}, want a module of the model or its path{hint}"
        )
    path = next((path for path, module in model.named_modules() if module is given), None)
    if path is None:
        raise ValueError(
            f"{name}: the {type(given).__name__} that was given is no part of the model"
        )
    return path, given


def _find_layers(
    model: nn.Module, config: Any, family: Family, text: nn.Module | None
) -> tuple[nn.Module, nn.ModuleList]:
    depth = getattr(text_config(config), "num_hidden_layers", None)
    if text is not None:
        module = text
    elif family.text is not None:
        module = _module(model, "text_model", family.text)[1]
    else:
        get: Any = getattr(model, "get_decoder", None)
        decoder = None if get is None else get()
        module = decoder if isinstance(decoder, nn.Module) else model
    path = [type(module).__name__]
    while True:
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and (depth is None or len(layers) == depth):
            return module, layers
        child = next(
            (c for n in DESCENT if isinstance(c := getattr(module, n, None), nn.Module)), None
        )
        if child is None or child is module:
            break
        module = child
        path.append(type(module).__name__)
    raise ValueError(
        f"model: no decoder layers in {type(model).__name__}: looked for a ModuleList `.layers` of {depth} modules in "
        f"{' → '.join(path)}; pass text_model= (a module, or its path in the model) whose `.layers` are the decoder's, "
        "or layers= (the ModuleList, or its path)"
    )


def _token_ids(config: Any, kind: str) -> tuple[int, ...]:
    ids = (getattr(config, f"{kind}_token_{suffix}", None) for suffix in ("id", "index"))
    return tuple(sorted({i for i in ids if isinstance(i, int)}))


def visual_tokens(config: Any, inputs: Inputs) -> Tensor | None:
    """Mask (B, T) of the image tokens in `input_ids`; None without ids, or if the config names no
    image token."""
    ids, tokens = inputs.get("input_ids"), _token_ids(config, "image")
    return torch.isin(ids, ids.new_tensor(tokens)) if torch.is_tensor(ids) and tokens else None
