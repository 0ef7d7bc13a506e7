"""Samples from image files: the arguments of a model's forward, and the masks and grid of the
image's patches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pre_kernels.integrations.model_config import visual_tokens

from .data import Item, MaskSource, find_images, open_image, open_masks
from .geometry import find_packing, token_grid, token_objects
from .left_out import Tally, Unusable, none_left
from .measure import Sample

PROMPT = "Describe the image."
# How many images are prepared while the model is busy.
AHEAD = 4
# What is made of an image, and why it, or only its mask, cannot be used.
Prepared = tuple[Sample | None, Unusable | None]


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
            Unusable: the image cannot be read, the processor refuses it, or its mask cannot be
                read, has another size or shows no object. It is a ValueError whose message names
                the file.
            ValueError: the model and its processor can use no image, or no mask.
        """
        sample, error = self.usable(item)
        if error is not None:
            raise error
        assert sample is not None
        return sample

    def usable(self, item: Item) -> Prepared:
        """The same, with the error instead of raising it. The sample is None if the image cannot be
        used. It has no masks if only the mask cannot be used."""
        try:
            image = open_image(item.path)
            inputs = self._inputs(item, image)
        except Unusable as error:
            return None, error
        placed = visual_tokens(self.config, inputs)
        if placed is None or not placed.any():
            raise ValueError(
                f"processor: {type(self.processor).__name__} put no visual tokens into the text "
                f"{self.text!r}, want the model's own processor and a text with a place for the "
                "image"
            )
        tokens = int(placed.sum())
        masks = None
        without = None
        try:
            masks = self._masks(item, image.size, inputs, tokens)
        except Unusable as error:
            without = error
        inputs = {
            name: value.to(self.dtype)
            if torch.is_tensor(value) and value.is_floating_point()
            else value
            for name, value in inputs.items()
        }
        grid = token_grid(inputs, tokens, self.config.model_type)
        return Sample(inputs, item.label, masks, grid), without

    def _inputs(self, item: Item, image: Any) -> dict[str, Any]:
        try:
            return dict(self._process(image, return_tensors="pt"))
        except (ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            # The size or the pixels of an image can cause these errors. Others have other causes.
            name = type(self.processor).__name__
            raise Unusable(
                "refused", f"images: {name} refuses {item.path}: {type(error).__name__}: {error}"
            ) from error

    def _masks(
        self, item: Item, size: tuple[int, int], inputs: dict[str, Any], tokens: int
    ) -> Tensor | None:
        """The masks of the image's tokens, or None if there are none for this image."""
        objects = None if self.masks is None else self.masks.objects(item, size)
        if objects is None:
            return None
        kind = self.config.model_type
        masks = token_objects(self._process, objects, inputs, tokens, kind, packing=self.packing)
        if not masks.any():
            raise Unusable(
                "mask_empty",
                f"masks: got no object of half a patch or more in the mask of {item.name}, want at "
                "least one (a value in --background is not an object)",
            )
        return masks

    def _process(self, image: Any, **options: Any) -> Any:
        return self.processor(images=[image], text=[self.text], **options)


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
    processor refuses, are left out. An image whose mask cannot be read, has another size or shows
    no object is used without it. Warnings name the first few for each reason, and count them all.

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
    said: list[str] = []
    tally = Tally([], said.append)
    for item in images.items:
        sample, without = prepare.usable(item)
        if sample is not None:
            samples.append(sample)
        if without is not None:
            tally.add(item.name, without)
    tally.close()
    for text in said:
        warnings.warn(f"left out: {text}", stacklevel=2)
    if not samples:
        raise ValueError(none_left(images.folder, len(images.items), tally.left_out))
    return samples


def ahead(
    prepare: Callable[[Item], Prepared], items: Iterable[Item]
) -> Iterator[tuple[Item, Sample | None, Unusable | None]]:
    """Yield each item in order, with what `prepare` returns for it. Threads prepare some of them
    ahead."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: list[tuple[Item, Future[Prepared]]] = []
        rest = iter(items)
        try:
            while True:
                while len(waiting) < AHEAD and (item := next(rest, None)) is not None:
                    waiting.append((item, pool.submit(prepare, item)))
                if not waiting:
                    return
                item, future = waiting.pop(0)
                yield item, *future.result()
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
