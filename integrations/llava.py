"""Visual tokens in the original code bases of LLaVA, LLaVA-NeXT and TinyLLaVA.

Their `prepare_inputs_labels_for_multimodal` puts image features between the embeddings of the words
and does not report where. But it moves the labels along, and gives image rows the label -100. So in
a training forward it gets the number of each position as its label. The labels that it returns then
say which word every row is, and the true labels are looked up with them.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREPARE = "prepare_inputs_labels_for_multimodal"
ENCODE = "encode_images"
EMBEDS = ("embed_tokens", "get_input_embeddings")
TAKEN = ("input_ids", "labels", "attention_mask")  # PREPARE must have these arguments


def is_original(model: Any) -> bool:
    """Whether `model` merges text and images like the original code bases."""
    return callable(getattr(model, PREPARE, None))


def check_merge(model: nn.Module) -> None:
    """Raise a ValueError if a model that `is_original` lacks something that `Merge` needs. The
    error names it."""
    method: Any = getattr(type(model), PREPARE, None)
    taken = inspect.signature(method).parameters if method is not None else ()
    lacks = [] if callable(getattr(model, ENCODE, None)) else [f"a method {ENCODE}(images)"]
    lacks += [] if method is not None else [f"{PREPARE} as a method of its class"]
    lacks += [
        f"an argument {name} of {PREPARE}"
        for name in TAKEN
        if method is not None and name not in taken
    ]
    if lacks:
        raise ValueError(
            f"model: {type(model).__name__} merges text and images in {PREPARE}, but lacks "
            f"{' and '.join(lacks)}, without which its visual tokens are not found; add it, or "
            "pass mask_fn="
        )


class Merge:
    """Follows the merge of one model: call `open()` before a forward and `close()` after it.

    Args:
        model: a model that passes `check_merge`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: Any = None
        self.followed: tuple[Tensor, Tensor | None] | None = None
        self.tokens: dict[tuple[int, ...], int] = {}
        size = getattr(getattr(_tower(model), "config", None), "image_size", None)
        if isinstance(size, int):
            # Count the tokens of the usual image size before parameters are sharded. An error is
            # raised again when the tokens are first needed.
            with contextlib.suppress(RuntimeError):
                self._tokens((3, size, size))

    def open(self) -> None:
        """Follow the model's merges until `close()`."""
        self.before = vars(self.model).get(PREPARE)
        self.followed = None
        vars(self.model)[PREPARE] = self._followed

    def close(self) -> None:
        """Restore the model's method. Calling this twice is fine."""
        if vars(self.model).get(PREPARE) == self._followed:
            del vars(self.model)[PREPARE]
            if self.before is not None:
                vars(self.model)[PREPARE] = self.before

    def mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The bool mask (B, T) of the visual tokens of a forward with these arguments, where T is
        the length after the merge. None without images.

        For the forward that was just followed the mask is known. For any other forward the merge is
        run without the model's weights.
        """
        followed = self.followed
        self.followed = None
        if followed is not None and followed[0] is inputs.get("input_ids"):
            return followed[1]
        return self._rehearsed(inputs)[0]

    def numbers(self, inputs: Mapping[str, Any]) -> Tensor:
        """The number (B, T) of each row's image, counted from 1 in the order of `images`; 0 for
        text."""
        mask, features = self._rehearsed(inputs)
        if mask is None:
            return torch.zeros_like(inputs["input_ids"])
        numbers = torch.searchsorted(self._ends(inputs["images"]), features) + 1
        # Newline rows come from no feature; they belong to the image before them.
        return (numbers * (features > 0)).cummax(-1).values.mul(mask.cpu()).to(mask.device)

    def projected(self, inputs: Mapping[str, Any], rows: Tensor) -> Tensor:
        """The rows (N, z) of the projector's input `rows` (M, z) that belong to the visual tokens,
        in the order of the tokens.

        Raises:
            ValueError: if rows and visual tokens are not one to one.
        """
        mask, features = self._rehearsed(inputs)
        index = features[mask.cpu()].to(rows.device) if mask is not None else features.long()
        if mask is not None and (total := int(self._ends(inputs["images"])[-1])) != len(rows):
            raise ValueError(
                f"anchor: {len(rows)} rows entered the projector, which made {total} visual tokens "
                'of them, so they do not correspond one to one; use "pre_llm", or pass a callable '
                "anchor"
            )
        if (index < 1).any() or (index > len(rows)).any() or (index != index.long()).any():
            raise ValueError(
                "anchor: visual tokens that come from no row of the projector's input alone "
                '(newlines, pooled frames) have no anchor there; use "pre_llm", or pass a callable '
                "anchor"
            )
        return rows[index.long() - 1]

    def _ends(self, images: Any) -> Tensor:
        """The cumulative number (images,) of features at the end of each image. An image with
        several crops counts as one image."""
        crops = [len(image) if image.dim() == 4 else 1 for image in images]
        return torch.tensor(crops).cumsum(0) * self._tokens(tuple(images[0].shape[-3:]))

    def _followed(self, *args: Any, **kwargs: Any) -> Any:
        own = types.MethodType(getattr(type(self.model), PREPARE), self.model)
        given = inspect.signature(own).bind(*args, **kwargs).arguments
        ids = given["input_ids"]
        output, mask = _follow(self.before or own, given)
        self.followed = ids, mask
        return output

    def _rehearsed(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        """The mask (B, T), and for each row the number (B, T) of the feature it is made from,
        counted from 1; 0 if it is made from none."""
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError(
                "input_ids: the forward got none, so its visual tokens cannot be found; pass "
                "mask_fn="
            )
        stand_in = _stand_in(self.model, self._tokens)
        method = types.MethodType(getattr(type(self.model), PREPARE), stand_in)
        taken = inspect.signature(method).parameters
        arguments = {name: _without_data(inputs[name], name) for name in taken if name in inputs}
        for name in ("position_ids", "attention_mask", "past_key_values", "labels", "images"):
            if name in taken:
                arguments.setdefault(name, None)
        with torch.no_grad():
            output, mask = _follow(method, arguments)
        if mask is None:
            return None, torch.zeros(0)
        return mask.to(ids.device), output[4][..., 0]

    def _tokens(self, shape: tuple[int, ...]) -> int:
        """The number of tokens that the model makes of an image of this shape. The model's own code
        is run on the meta device."""
        if shape not in self.tokens:
            encode = _Encode(self.model)
            named = [*encode.named_parameters(), *encode.named_buffers()]
            # A parameter that ZeRO-3 has split keeps its full shape in ds_shape.
            empty = {
                n: torch.empty(getattr(t, "ds_shape", t.shape), dtype=t.dtype, device="meta")
                for n, t in named
            }
            try:
                with torch.no_grad():
                    made = torch.func.functional_call(
                        encode, empty, (torch.empty(1, *shape, device="meta"),)
                    )
            except Exception as error:
                raise RuntimeError(
                    f"images: cannot tell how many tokens {type(self.model).__name__} makes of an "
                    f"image of shape {shape}: {error}; pass mask_fn= to apply_pre"
                ) from error
            self.tokens[shape] = made.shape[1]
        return self.tokens[shape]


def _follow(
    method: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[tuple[Any, ...], Tensor | None]:
    """The values that the merge returns for these arguments, and the mask (B, T) of visual tokens,
    which is None if it merged nothing."""
    ids = arguments["input_ids"]
    labels = arguments.get("labels")
    attention = arguments.get("attention_mask")
    numbered = arguments | {"labels": torch.arange(ids.numel(), device=ids.device).view_as(ids)}
    if attention is None:
        # The merge extends this mask: in its result padding is 0 and image rows are 1.
        numbered["attention_mask"] = torch.ones_like(ids)
    output = list(method(**numbered))
    if len(output) < 6:
        raise RuntimeError(
            f"{PREPARE}: returned {len(output)} values, want LLaVA's 6 (input_ids, position_ids, "
            "attention_mask, past_key_values, inputs_embeds, labels); pass mask_fn= to apply_pre"
        )
    if output[4] is None:
        output[2] = attention
        output[5] = labels
        return tuple(output), None
    words = output[5]
    mask = (words < 0) & output[2].bool()
    output[5] = (
        None if labels is None else labels.flatten()[words.clamp(min=0)].where(words >= 0, -100)
    )
    if attention is None:
        output[2] = None
    return tuple(output), mask


def _without_data(value: Any, name: str) -> Any:
    """An argument of the merge on the CPU. Images are moved to the meta device, which keeps only
    their shapes."""
    if name == "images" and value is not None:
        if isinstance(value, (list, tuple)):
            return [_without_data(v, name) for v in value]
        return value.to("meta")
    return value.cpu() if torch.is_tensor(value) else value


def _stand_in(module: nn.Module, tokens: Callable[[tuple[int, ...]], int]) -> Any:
    """A shallow copy of the model on the CPU that merges without weights. A feature of the copy is
    a single number, its index among all features."""

    def embed_tokens(ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 1, dtype=torch.double)

    def encode_images(images: Tensor) -> Tensor:
        count = len(images)
        each = tokens(tuple(images.shape[1:]))
        return torch.arange(1, count * each + 1, dtype=torch.double).view(count, each, 1)

    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin).pop(PREPARE, None)
    # Parameters of the model itself (the newline, ...) get the width of a feature. One more
    # parameter makes `.device` the CPU even if the model has none.
    empty = {
        name: nn.Parameter(torch.zeros(1, dtype=torch.double))
        for name in [*module._parameters, "stand_in"]
    }
    inner: dict[str, Any] = {
        n: _stand_in(m, tokens) if m is not None and any(hasattr(m, name) for name in EMBEDS) else m
        for n, m in module._modules.items()
    }
    functions = {
        "embed_tokens": embed_tokens,
        "get_input_embeddings": lambda: embed_tokens,
        ENCODE: encode_images,
    }
    # training=False, because some merges draw random positions in training mode.
    vars(twin).update(_parameters=empty, _modules=inner, training=False, **functions)
    return twin


def _tower(model: Any) -> Any:
    """The vision tower, from LLaVA's method or TinyLLaVA's attribute. None if there is neither."""
    get = getattr(model, "get_vision_tower", None)
    return get() if callable(get) else getattr(model, "vision_tower", None)


class _Encode(nn.Module):
    """A module whose forward is the model's `encode_images`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        tower = _tower(model)
        # The model may keep the tower outside its registered modules. A tower that is registered is
        # not registered again, because it would then stay on the meta device.
        self.hidden_tower = None if any(m is tower for m in model.modules()) else tower

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.encode_images(images)
        return features
