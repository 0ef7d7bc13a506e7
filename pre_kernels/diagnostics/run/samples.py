"""Samples from image files: the arguments of a model's forward, and the masks and grid of the
image's patches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pre_kernels.integrations.model_config import visual_tokens

from .data import Images, Item, MaskSource, find_images, open_image, open_masks
from .geometry import find_packing, token_grid, token_objects
from .measure import Sample

PROMPT = "Describe the image."
# How many images are prepared while the model is busy.
AHEAD = 4
LEFT_OUT = {"unreadable": "could not be read", "refused": "were refused by the model's processor"}


class Preparation:
    """Makes a `Sample` from an image file for one model.

    The text is the model's chat template with the image and then `prompt`. Without a template, it
    is the image's placeholder and the prompt. In a causal decoder, text after the image does not
    influence the image's tokens.

    Args:
        model, processor: a model of transformers and its processor.
        masks: the source of masks.
        prompt: the text after the image.
    """

    def __init__(
        self, model: Any, processor: Any, masks: MaskSource | None = None, prompt: str = PROMPT
    ) -> None:
        self.config = model.config
        self.dtype = model.dtype
        self.packing = find_packing(model)
        self.processor = processor
        self.masks = masks
        self.text = _text(processor, prompt)

    def __call__(self, item: Item) -> Sample:
        """The image as a batch of one, on the CPU.

        Raises:
            Unusable: the image cannot be read, or the processor refuses it.
            ValueError: the mask does not fit the image. Both messages name the file.
        """
        try:
            image = open_image(item.path)
        except ValueError as error:
            raise Unusable("unreadable", str(error)) from error
        try:
            inputs = dict(self._process(image, return_tensors="pt"))
        except (ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            # The size or the pixels of an image can cause these errors. Others have other causes.
            name = type(self.processor).__name__
            raise Unusable(
                "refused", f"images: {name} refuses {item.path}: {type(error).__name__}: {error}"
            ) from error
        placed = visual_tokens(self.config, inputs)
        if placed is None or not placed.any():
            raise ValueError(
                f"processor: {type(self.processor).__name__} put no visual tokens into the text "
                f"{self.text!r}, want the model's own processor and a text with a place for the "
                "image"
            )
        tokens = int(placed.sum())
        kind = self.config.model_type
        masks = None
        if self.masks is not None:
            objects = self.masks.objects(item, image.size)
            if objects is not None:
                masks = token_objects(
                    self._process, objects, inputs, tokens, kind, packing=self.packing
                )
        inputs = {
            name: value.to(self.dtype)
            if torch.is_tensor(value) and value.is_floating_point()
            else value
            for name, value in inputs.items()
        }
        return Sample(inputs, item.label, masks, token_grid(inputs, tokens, kind))

    def _process(self, image: Any, **options: Any) -> Any:
        return self.processor(images=[image], text=[self.text], **options)


class Unusable(ValueError):
    """Raised for an image that is left out, while others can be used. `reason` is a key of
    `LEFT_OUT`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def load_samples(
    model: Any,
    processor: Any,
    folder: str | Path,
    *,
    masks: str | Path | None = None,
    labels: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    background: tuple[int, ...] = (0, 255),
    prompt: str = PROMPT,
) -> list[Sample]:
    """The images of a folder as samples for `LayerCallback` or `measure`, all in memory.

    The arguments are those of `pre-kernels diagnose`, which gives the metrics of the callback if
    the checkpoint is diagnosed with the same arguments. Images that cannot be read, or that the
    processor refuses, are left out, and a warning names each of them.

    ```python
    samples = load_samples(model, processor, "held-out/", limit=256)
    ```

    Raises:
        ValueError: an argument is wrong, or every image is left out. The message names the
            argument, what it got and what it needs.
    """
    source = None if masks is None else open_masks(Path(masks), background)
    images = find_images(Path(folder), None if labels is None else Path(labels), limit, seed)
    prepare = Preparation(model, processor, source, prompt)
    samples: list[Sample] = []
    left_out: list[tuple[str, str]] = []
    for item in images.items:
        try:
            samples.append(prepare(item))
        except Unusable as error:
            left_out.append((item.name, error.reason))
            warnings.warn(f"left out: {error}", stacklevel=2)
    if not samples:
        raise ValueError(none_left(images, left_out))
    return samples


def none_left(images: Images, left_out: Sequence[tuple[str, str]]) -> str:
    """The message if no image is left. `left_out` has the name and the reason of each image."""
    reasons = "; ".join(counted(left_out))
    return f"images: none of the {len(images.items)} in {images.folder} can be used: {reasons}"


def counted(left_out: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each reason: how many images were left out for it, and the first names."""
    lines = []
    for reason, what in LEFT_OUT.items():
        names = [name for name, its in left_out if its == reason]
        if names:
            lines.append(f"{len(names)} images {what}: {', '.join(names[:10])}")
    return lines


def ahead(
    prepare: Callable[[Item], Sample], items: Iterable[Item]
) -> Iterator[tuple[Item, Sample | Unusable]]:
    """Yield each item in order, with its sample or with the reason why its image is left out.
    Threads prepare some of them ahead."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: list[tuple[Item, Future[Sample]]] = []
        rest = iter(items)
        try:
            while True:
                while len(waiting) < AHEAD and (item := next(rest, None)) is not None:
                    waiting.append((item, pool.submit(prepare, item)))
                if not waiting:
                    return
                item, future = waiting.pop(0)
                try:
                    yield item, future.result()
                except Unusable as error:
                    yield item, error
        finally:
            for _, future in waiting:
                future.cancel()


def _text(processor: Any, prompt: str) -> str:
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text
    token = getattr(processor, "image_token", None)
    if token is None:
        raise ValueError(
            f"processor: {type(processor).__name__} has neither a chat template nor an image "
            "token, want one of them"
        )
    return f"{token}\n{prompt}"
