"""EncoderAnchor: anchors from an external image encoder (DINOv2, SigLIP, ...), one for each visual
token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pre_kernels import checks

from .averaging import Average
from .model_config import visual_tokens

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODES = ("bilinear", "area")


class EncoderAnchor:
    """A callable `anchor` for `apply_pre`: the features of a frozen encoder, resized to each
    image's visual tokens.

    For each image of the batch the model's normalisation is undone, the image is resized to
    `size`², normalised for the encoder and encoded without gradients. The features of its patches
    (class and register tokens are dropped) are resized to the rows and columns of its visual
    tokens. This reads image sizes on the host, so it waits for the device.

    The visual tokens of an image must form a grid in row-major order. Two layouts are supported:
    pixels (images, 3, H, W) where every image is a square of the same number of tokens (LLaVA,
    VipLLaVA, PaliGemma, Gemma 3, each tile of InternVL), and `image_grid_thw` with pixels cut into
    patches (Qwen2-VL, Qwen2.5-VL, Qwen3-VL). Newline rows (LLaVA-NeXT, LLaVA-OneVision), images of
    different sizes padded into one tensor (`image_sizes`) and videos raise.

    The encoder is frozen, put in eval mode and moved to the device of the pixels. It keeps its
    dtype. It never becomes a part of the model, so it is not saved, trained or sharded with it, and
    a deep copy of the model shares it. `from_pretrained` splits an encoder over the processes when
    a ZeRO-3 configuration is active; such an encoder is gathered on every process, and all of them
    must construct the anchor.

    With `ema` the anchors are those of an exponential moving average of the encoder, which trains
    and may be the model's own vision tower. The average is a copy in float32 at least, and
    `handle.save` writes it with the head.

    ```python
    dino = AutoModel.from_pretrained("facebook/dinov2-base")
    vision = processor.image_processor
    anchor = EncoderAnchor(dino, model, image_mean=vision.image_mean, image_std=vision.image_std)
    apply_pre(model, anchor=anchor)
    ```

    Attributes:
        anchor_dim: z, the width of the features.

    Args:
        encoder: maps (images, 3, size, size) to (images, tokens, z), or to an output with such a
            `last_hidden_state`. Its last tokens must be a square of patches.
        model: the model that PRe is attached to. Only its config is read.
        image_mean, image_std: three channel values each, of the normalisation that `pixels` went
            through, as in the model's image processor. Both None if that was the encoder's own.
        encoder_mean, encoder_std: three channel values each, of the normalisation that the encoder
            needs.
        size: height and width of the encoder's images in pixels. None: `image_size` of its config.
        pixels: name of the forward's argument that holds the images.
        mode: how features are resized: "bilinear" (antialiased), or "area" (the mean over the area
            that a token covers).
        anchor_dim: z. None: `hidden_size` of the encoder's config.
        ema: the decay of the average at each optimizer step, in (0, 1), such as 0.999. None: the
            encoder as it is, frozen.

    Raises:
        ValueError, TypeError: with the argument, the value it got and the value it needs. In a
            forward: for a batch whose images cannot be matched with its visual tokens.
    """

    def __init__(
        self,
        encoder: nn.Module,
        model: nn.Module,
        *,
        image_mean: Sequence[float] | None,
        image_std: Sequence[float] | None,
        encoder_mean: Sequence[float] = IMAGENET_MEAN,
        encoder_std: Sequence[float] = IMAGENET_STD,
        size: int | None = None,
        pixels: str = "pixel_values",
        mode: str = "bilinear",
        anchor_dim: int | None = None,
        ema: float | None = None,
    ) -> None:
        if not isinstance(encoder, nn.Module):
            raise TypeError(
                f"encoder: got {type(encoder).__name__}, want an nn.Module, such as "
                'AutoModel.from_pretrained("facebook/dinov2-base")'
            )
        config = getattr(model, "config", None)
        if config is None:
            raise TypeError(
                f"model: got {type(model).__name__} without .config, want a Hugging Face model"
            )
        if ema is not None and not 0 < checks.nonnegative("ema", ema) < 1:
            raise ValueError(f"ema: got {ema}, want a number in (0, 1), or None")
        if ema is None and any(module is encoder for module in model.modules()):
            raise ValueError(
                "encoder: got a module of the model, which would be frozen; want a separate "
                "module, or ema=0.999 for a moving average of it"
            )
        if getattr(config, "image_grid_pinpoints", None):
            raise ValueError(
                f"model: {type(model).__name__} cuts images into tiles and adds newline rows, so "
                "its visual tokens are not a grid; pass a callable anchor of your own"
            )
        if (image_mean is None) != (image_std is None):
            raise ValueError(
                "image_mean, image_std: got one of them, want both, or None for both; the model's "
                "are in processor.image_processor"
            )
        self.given = (
            None
            if image_mean is None
            else (_color("image_mean", image_mean), _color("image_std", image_std))
        )
        self.wanted = (_color("encoder_mean", encoder_mean), _color("encoder_std", encoder_std))
        its = getattr(encoder, "config", None)
        self.size = checks.width("size", getattr(its, "image_size", None) if size is None else size)
        self.anchor_dim = checks.width(
            "anchor_dim", getattr(its, "hidden_size", None) if anchor_dim is None else anchor_dim
        )
        self.mode = checks.choice("mode", mode, MODES)
        self.patch = getattr(its, "patch_size", None)
        self.average = None if ema is None else Average(encoder, ema)
        if self.average is None:
            _make_whole(encoder)
        self.encoder = self.average.copy if self.average else encoder.eval().requires_grad_(False)
        self.config = config
        self.pixels = pixels

    def __deepcopy__(self, memo: Any) -> EncoderAnchor:
        return self

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], rows: Tensor) -> Tensor:
        """The anchors (N, z) of the N visual tokens that the bool mask `rows` (B, T) marks in a
        forward with the arguments `inputs`."""
        places = visual_tokens(self.config, inputs)
        places = rows if places is None else places.to(rows.device)
        images, grids = self._images(inputs, int(places.sum()))
        features = self._encode(images)
        by_image: dict[int, Tensor] = {}
        for grid in set(grids):
            members = [i for i, other in enumerate(grids) if other == grid]
            resized = self._resize(features[members], grid).flatten(2).transpose(1, 2)
            by_image.update(zip(members, resized, strict=True))
        tokens = torch.cat([by_image[i] for i in range(len(grids))])
        return tokens[rows[places].to(features.device)]

    def _images(
        self, inputs: dict[str, Any], total: int
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """The images (n, 3, H, W), in one tensor if they have one size, else one tensor each; and
        for each image the rows and columns of its visual tokens."""
        pixels = inputs.get(self.pixels)
        grid = inputs.get("image_grid_thw")
        if not torch.is_tensor(pixels) or not pixels.is_floating_point():
            what = pixels.dtype if torch.is_tensor(pixels) else type(pixels).__name__
            raise TypeError(
                f"anchor: the forward's {self.pixels} is {what}, want a floating point tensor of "
                "images"
            )
        if inputs.get("pixel_values_videos") is not None:
            raise ValueError(
                "anchor: the batch has videos, which EncoderAnchor does not take; want only images"
            )
        if inputs.get("image_sizes") is not None:
            raise ValueError(
                "anchor: the batch has image_sizes, so its images are padded; want images of one "
                "size"
            )
        if pixels.dim() == 4 and grid is None:
            side = math.isqrt(total // max(len(pixels), 1))
            if total != len(pixels) * side**2:
                raise ValueError(
                    f"anchor: got {total} visual tokens for {len(pixels)} images, want a square "
                    "number of tokens for each image"
                )
            return [pixels], [(side, side)] * len(pixels)
        if grid is not None:
            merge = getattr(self.config.vision_config, "spatial_merge_size", None)
            if merge is None or inputs.get("image_merge_sizes") is not None:
                raise ValueError(
                    "anchor: this model merges the patches of each image by a factor of its own, "
                    "which EncoderAnchor does not support; pass a callable of your own"
                )
            sizes = [tuple(size) for size in grid.tolist()]
            grids = [(height // merge, width // merge) for _, height, width in sizes]
            if any(frames != 1 for frames, *_ in sizes) or sum(h * w for h, w in grids) != total:
                raise ValueError(
                    f"anchor: image_grid_thw {sizes} does not match the {total} visual tokens of "
                    "the batch"
                )
            if pixels.dim() == 4 and len(pixels) == len(sizes):
                return [pixels], grids
            if pixels.dim() == 2 and len(pixels) == sum(h * w for _, h, w in sizes):
                parts = pixels.split([h * w for _, h, w in sizes])
                images = [
                    self._whole(part, *size[1:]) for part, size in zip(parts, sizes, strict=True)
                ]
                return images, grids
        raise ValueError(
            f"anchor: the forward's {self.pixels} has shape {tuple(pixels.shape)}, want images "
            "(n, 3, H, W), or patches with an image_grid_thw that counts them"
        )

    def _whole(self, patches: Tensor, height: int, width: int) -> Tensor:
        """The image (1, 3, H, W) that is made of `height` · `width` patches. The patches come block
        by block, in the order in which the model merges them."""
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        side = vision.patch_size
        frames = vision.temporal_patch_size
        if patches.shape[1] != 3 * frames * side**2:
            raise ValueError(
                f"anchor: a patch has {patches.shape[1]} values, want 3 · {frames} · {side}²"
            )
        blocks = patches.view(height // merge, width // merge, merge, merge, 3, frames, side, side)
        return (
            blocks[..., 0, :, :]
            .permute(4, 0, 2, 5, 1, 3, 6)
            .reshape(1, 3, height * side, width * side)
        )

    def _encode(self, images: list[Tensor]) -> Tensor:
        """The encoder's features (images, z, g, g) in float32, on its grid of g · g patches."""
        like = next(self.encoder.parameters(), images[0])
        if like.device != images[0].device:
            self.encoder.to(images[0].device)
        if self.average is not None:
            self.average.update()
        batch = torch.cat([self._prepare(part.float()) for part in images]).to(like.dtype)
        its = like.dtype if self.average is None else self.average.dtype
        # The float32 average of an encoder in half precision runs as that does.
        run = torch.autocast(batch.device.type, its) if its != like.dtype else nullcontext()
        with run:
            output = self.encoder.eval()(batch)
        tokens: Tensor | None = (
            output if torch.is_tensor(output) else getattr(output, "last_hidden_state", None)
        )
        wanted = (len(batch), self.anchor_dim)
        if tokens is None or tokens.dim() != 3 or tokens.shape[::2] != wanted:
            what = type(output).__name__ if tokens is None else f"shape {tuple(tokens.shape)}"
            raise ValueError(
                f"encoder: returned {what} for {len(batch)} images, "
                f"want ({len(batch)}, tokens, {self.anchor_dim})"
            )
        count = tokens.shape[1]
        side = math.isqrt(count)
        if isinstance(self.patch, int) and (self.size // self.patch) ** 2 <= count:
            side = self.size // self.patch
        # Class and register tokens come first, then the patches.
        patches = tokens[:, count - side**2 :].float().transpose(1, 2)
        features: Tensor = patches.unflatten(2, (side, side))
        return features

    def _prepare(self, images: Tensor) -> Tensor:
        if self.given is not None:
            mean, std, new_mean, new_std = (
                images.new_tensor(color).view(3, 1, 1) for color in (*self.given, *self.wanted)
            )
            images = (images * std + mean - new_mean) / new_std
        if images.shape[2:] == (self.size, self.size):
            return images
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)

    def _resize(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        if features.shape[2:] == grid:
            return features
        return F.interpolate(features, grid, mode=self.mode, antialias=self.mode == "bilinear")


def _make_whole(encoder: nn.Module) -> None:
    """Replace parameters that ZeRO-3 has split by full ones, because no engine gathers them in the
    encoder's forward."""
    split = [p for p in encoder.parameters() if hasattr(p, "ds_id")]
    if not split:
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        for module in encoder.modules():
            for name, p in module.named_parameters(recurse=False):
                module.register_parameter(
                    name, nn.Parameter(p.detach().clone(), requires_grad=False)
                )


def _color(name: str, value: Any) -> list[float]:
    positive = name.endswith("std")
    try:
        color = [float(v) for v in value]
    except (TypeError, ValueError):
        color = []
    if len(color) != 3 or not all(map(math.isfinite, color)) or (positive and min(color) <= 0):
        raise ValueError(
            f"{name}: got {value!r}, want three numbers{', each > 0' if positive else ''}"
        )
    return color
