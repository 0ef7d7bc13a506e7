"""Find the parts of a vision-language model that PRe needs: one generic rule, and a table of what
the rule does not cover."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .image_rules import (
    equal_parts,
    grids,
    patches,
    rows_as_is,
    rows_merged,
    rows_merged_windows,
    runs,
    runs_or_parts,
    shapes,
    states_altup,
    states_as_is,
    tiles,
)
from .llava import Merge, check_merge, is_original
from .model_config import Inputs, text_config, token_ids
from .notices import Notices


@dataclass(frozen=True)
class Family:
    """The settings of one model family. Every default is the generic rule.

    Attributes:
        images: a function (mask (B, T) of one kind of visual token, "image" or "video", the
            forward's arguments, config) → the number (N,) of each visual token's image, counted
            from 0 in batch-major order. A video counts as an image, and so does each tile of an
            image if other tokens stand between the tiles.
        projector: end of the path of the module whose input rows are the visual tokens, for
            anchor="pre_projector". Several ends are alternatives, of which a model has one.
        projector_rows: a function (the input of the projector in each of its calls in a forward,
            the forward's arguments, config) → (M, z), one row for each visual token, first those of
            all images, then those of all videos.
        text: path of the text model, whose `.layers` are the decoder layers.
        image_inputs, video_inputs: names of arguments of the forward. One of them is present if the
            batch has images (videos).
        video_token: the kind of token that stands for a video, if videos have no token of their
            own.
        hidden: a function (the input or output of a decoder layer, config) → the states (B, T, d)
            that the layer works on.
        name: the family's common name.
        since: the oldest supported transformers that has the family.
        videos: whether the tokens of videos are visual tokens too.
    """

    images: Callable[[Tensor, str, Inputs, Any], Tensor] = runs
    projector: str | tuple[str, ...] | None = None
    text: str | None = None
    image_inputs: tuple[str, ...] = ("pixel_values", "image_embeds")
    video_inputs: tuple[str, ...] = ("pixel_values_videos", "video_embeds")
    video_token: str = "video"
    hidden: Callable[[Tensor, Any], Tensor] = states_as_is
    projector_rows: Callable[[list[Tensor], Inputs, Any], Tensor] = rows_as_is
    name: str = ""
    since: str = "4.57"
    videos: bool = False


GENERIC = Family()
IDEFICS = ("pixel_values", "image_hidden_states")
LLAVA_PROJECTOR = "multi_modal_projector"
# The families by config.model_type.
FAMILIES = {
    "llava": Family(patches, LLAVA_PROJECTOR, name="LLaVA"),
    "llava_next": Family(name="LLaVA-NeXT"),
    "llava_next_video": Family(runs_or_parts, name="LLaVA-NeXT-Video", videos=True),
    "llava_onevision": Family(runs_or_parts, name="LLaVA-OneVision", videos=True),
    "vipllava": Family(equal_parts, LLAVA_PROJECTOR, name="VipLLaVA"),
    "qwen2_vl": Family(grids, "merger", projector_rows=rows_merged, name="Qwen2-VL", videos=True),
    "qwen2_5_vl": Family(
        grids, "merger", projector_rows=rows_merged_windows, name="Qwen2.5-VL", videos=True
    ),
    "qwen3_vl": Family(grids, "merger", projector_rows=rows_merged, name="Qwen3-VL", videos=True),
    "qwen3_vl_moe": Family(
        grids, "merger", projector_rows=rows_merged, name="Qwen3-VL-MoE", videos=True
    ),
    "qwen3_5": Family(
        grids, "merger", projector_rows=rows_merged, name="Qwen3.5", since="5.2", videos=True
    ),
    "qwen3_5_moe": Family(
        grids, "merger", projector_rows=rows_merged, name="Qwen3.5", since="5.2", videos=True
    ),
    # An image consists of several tiles, and each frame of a video counts as an image.
    "internvl": Family(runs, LLAVA_PROJECTOR, name="InternVL"),
    # Gemma 3 has no projector here: it pools patches, so its input does not have one row per token.
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
    # Idefics2 and Aria have no projector here: a resampler stands between patches and tokens.
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
    # These two concatenate 2 x 2 patches before the first linear layer of the projector.
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
    "gemma3n": Family(equal_parts, hidden=states_altup, name="Gemma 3n"),
}
ORIGINAL = Family(
    projector=("mm_projector", "connector"), name="the original LLaVA, LLaVA-NeXT and TinyLLaVA"
)

# The attributes that lead from a model down to its text model.
DESCENT = ("text_model", "language_model", "model", "decoder")


@dataclass
class Parts:
    """The parts of one model.

    Attributes:
        family: its row of `FAMILIES`, or `GENERIC` or `ORIGINAL`.
        config: the model's config.
        text: the text model. None if it is the whole model, whose `inputs_embeds` are not yet
            merged with the images.
        layers: the decoder layers, or modules that are called with the states between them.
        depth: the number of decoder layers whose output can be read.
        projector: the module whose input rows are the visual tokens, if the model has one.
        merge: finds the visual tokens in models of the original LLaVA code bases; `tokens` finds
            them in all others.
        notices: the warnings about this model.
    """

    family: Family
    config: Any
    text: nn.Module | None
    layers: nn.ModuleList
    depth: int
    projector: nn.Module | None
    merge: Merge | None = None
    notices: Notices = field(default_factory=Notices)

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """The ids in `input_ids` that stand for visual tokens, for each kind. They are read from
        the config anew in each call, because users set them late."""
        return {
            "image": token_ids(self.config, "image"),
            "video": token_ids(self.config, self.family.video_token),
        }

    @property
    def width(self) -> int:
        """The width of the hidden states, from the config, or else from a norm of the first layer.

        Raises:
            ValueError: if neither has one.
        """
        width = getattr(text_config(self.config), "hidden_size", None)
        if isinstance(width, int):
            return width
        layer = self.layers[0]
        for name, module in layer.named_modules():
            if "norm" in (name.rpartition(".")[2] or type(layer).__name__).lower():
                for parameter in module.parameters(recurse=bool(name)):
                    if parameter.dim() == 1:
                        return len(parameter)
        raise ValueError(
            f"model: its text config has hidden_size {width!r}, want an int; "
            f"and {type(layer).__name__} has no norm to read the width from; set hidden_size in "
            "model.config"
        )

    @property
    def projector_width(self) -> int:
        """The width of the projector's input rows.

        Raises:
            ValueError: if there is no projector, or no linear layer in it.
        """
        if self.projector is None:
            raise ValueError(
                'anchor: got "pre_projector", but no projector is known in this model whose input '
                "rows are its visual tokens one to one; pass a callable, "
                "anchor(inputs, rows) → (N, z), and anchor_dim=z"
            )
        widths = (m.in_features for m in self.projector.modules() if hasattr(m, "in_features"))
        width = next(widths, None)
        if not isinstance(width, int):
            raise ValueError(
                'anchor: got "pre_projector", but the projector has no linear layer to read its '
                'width from; use "pre_llm", or a callable with anchor_dim='
            )
        return width

    def dtype_and_device(self, number: int) -> tuple[torch.dtype, torch.device]:
        """The dtype and device of the hidden states that decoder layer `number`, in 1..L, makes.

        Raises:
            ValueError: if the layer has no floating point parameters.
        """
        layer = self.layers[number - 1]
        # Adapters may have another dtype (PEFT's are float32 over a quantised layer).
        adapters = {
            id(parameter)
            for module in layer.modules()
            for name in getattr(module, "adapter_layer_names", ())
            for parameter in getattr(getattr(module, name, None), "parameters", tuple)()
        }
        for module in layer.modules():
            for parameter in module.parameters(recurse=False):
                # Skip quantised weights, which are integers or one byte wide; the norm layers
                # beside them keep the dtype that the layer computes in.
                quantised = not parameter.is_floating_point() or parameter.element_size() == 1
                if quantised or id(parameter) in adapters:
                    continue
                # accelerate brings offloaded weights from "meta" to the device they are used on.
                device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
                if parameter.is_meta and device is not None:
                    return parameter.dtype, torch.device(device)
                return parameter.dtype, parameter.device
        raise ValueError(
            f"model: {type(layer).__name__} has no floating point parameters to take a dtype from; "
            "choose another layer="
        )


def find_parts(
    model: nn.Module,
    text_model: str | nn.Module | None = None,
    layers: str | nn.ModuleList | Sequence[nn.Module | str] | None = None,
) -> Parts:
    """Find the parts of `model`. A `text_model` or `layers` that is given is used as it is.

    Args:
        model: the plain model, without PEFT, DDP or another wrapper around it.
        text_model: the text model, or its path in `model`.
        layers: the ModuleList of decoder layers, or its path in `model`; or a list of the L + 1
            modules (or paths) that are called with the states before, between and after L layers.

    Raises:
        TypeError: if `text_model` is not a module, or `layers` is not a ModuleList.
        ValueError: if there is no config, if no decoder layers are found, or if a module or path
            that was given is not part of the model.
    """
    config = getattr(model, "config", None)
    if config is None and layers is None:
        inside = [name for name, part in model.named_children() if hasattr(part, "config")]
        raise ValueError(
            f"model: {type(model).__name__} has no .config; want a Hugging Face vision-language "
            f"model{f', such as its part: apply_pre(model.{inside[0]})' if inside else ''}, or "
            "pass layers= (the ModuleList of the decoder's layers, or its path) and mask_fn="
        )
    config = SimpleNamespace() if config is None else config
    original = is_original(model)
    model_type = getattr(config, "model_type", "").replace("-", "_")  # "lfm2-vl" in 4.57
    family = ORIGINAL if original else FAMILIES.get(model_type, GENERIC)
    text: nn.Module | None = (
        None if text_model is None else _module(model, "text_model", text_model)[1]
    )
    between = isinstance(layers, list) and any(isinstance(p, (nn.Module, str)) for p in layers[1:])
    if layers is None:
        text, decoder_layers = _find_layers(model, config, family, text)
    elif between:
        decoder_layers = nn.ModuleList(_module(model, "layers", part)[1] for part in layers)
    else:
        path, module = _module(model, "layers", layers)
        if not isinstance(module, nn.ModuleList):
            raise TypeError(
                f"layers: got a {type(module).__name__}, want the ModuleList of the decoder's "
                "layers"
            )
        if not len(module):
            raise ValueError("layers: got an empty ModuleList, want that of the decoder's layers")
        decoder_layers = module
        text = model.get_submodule(path.rpartition(".")[0]) if text is None else text
    ends = (family.projector,) if isinstance(family.projector, str) else family.projector or ()
    projector = next(
        (m for end in ends for n, m in model.named_modules() if f".{n}".endswith(f".{end}")), None
    )
    return Parts(
        family=family,
        config=config,
        text=None if text is model else text,
        layers=decoder_layers,
        depth=len(decoder_layers) - between,
        projector=projector,
        merge=Merge(model) if original else None,
    )


def check_tokens(parts: Parts, model: nn.Module) -> None:
    """Raise a ValueError for a model whose visual tokens cannot be found without a mask_fn."""
    crossed = getattr(text_config(parts.config), "cross_attention_layers", None)
    if crossed:
        raise ValueError(
            f"model: the images of {type(model).__name__} enter by cross-attention (its config has "
            f"cross_attention_layers {crossed}), so they have no tokens in the decoder; want a "
            "model whose decoder has visual tokens, or pass mask_fn="
        )
    if parts.merge is not None:
        check_merge(model)
    elif not any(parts.tokens.values()):
        raise ValueError(
            f"model: {type(model).__name__}'s config names no visual tokens (looked for "
            "image_token_id, image_token_index, video_token_id, video_token_index); want a "
            "vision-language model. If its code keeps the image token's id elsewhere, as "
            "InternVL's own chat code does, set image_token_id to that id in config.json or in "
            "model.config; or pass mask_fn="
        )


def _module(model: nn.Module, name: str, part: Any) -> tuple[str, nn.Module]:
    """The path and the module that `part` stands for, which is the value of argument `name`."""
    if isinstance(part, str):
        try:
            return part, model.get_submodule(part)
        except AttributeError as error:
            near = [path for path, _ in model.named_modules() if path.count(".") == 1][:8]
            raise ValueError(
                f"{name}: got {part!r}, which is not a module of the model: {error}; the model has "
                f"{', '.join(near)}, and those inside"
            ) from error
    if not isinstance(part, nn.Module):
        hint = "; numbers of layers go into layer=" if name == "layers" else ""
        raise TypeError(
            f"{name}: got {type(part).__name__}, want a module of the model or its path{hint}"
        )
    path = next((path for path, module in model.named_modules() if module is part), None)
    if path is None:
        raise ValueError(
            f"{name}: got a {type(part).__name__} that is not part of the model; want a module of "
            "the model or its path"
        )
    return path, part


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
        try:
            decoder = None if get is None else get()
        except AttributeError:  # it was taken out of the model
            decoder = None
        module = decoder if isinstance(decoder, nn.Module) else model
    path = [type(module).__name__]
    others = ""
    while True:
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.Module):
            others = f", found a {type(layers).__name__} of {len([*layers.children()])}"
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
        f"model: no decoder layers in {type(model).__name__}: looked for a ModuleList `.layers` "
        f"of {depth} modules in {' → '.join(path)}{others}; pass text_model= (a module, or its "
        "path in the model) whose `.layers` are the decoder's, or layers= (the ModuleList, or its "
        "path; also of a stage of a pipeline, if it begins with layer 1)"
    )
