"""A stand-in for the models of the original LLaVA code bases: their interface, with a merge of its
own.

The image token is -200 in `input_ids`; `images` are a tensor (images, 3, S, S) or a list of (crops,
3, S, S), one entry for each image token, and one unused entry for a sample without any. `truth`
keeps where the last merge put what. `TinyLlava` has the interface of TinyLLaVA, whose parts are
modules of the model itself and have other names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
)

from .tiny.models import WORDS, text_config

PLACE = -200
SIDE = 8
PATCH = 4
SEEN = 24


class Tower(nn.Module):
    """Maps patches to features (images, 4, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, SEEN, PATCH, PATCH)
        self.config = type("Config", (), {"image_size": SIDE})()
        self.runs = 0

    def forward(self, images: Tensor) -> Tensor:
        self.runs += not images.is_meta
        return self.embed(images.to(self.embed.weight.dtype)).flatten(2).transpose(1, 2).tanh()


class Body(LlamaModel):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.vision_tower = Tower()
        self.mm_projector = nn.Sequential(
            nn.Linear(SEEN, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.image_newline = nn.Parameter(torch.randn(config.hidden_size))

    def get_vision_tower(self) -> Tower:
        return self.vision_tower


class Merging:
    """The merge, given `encode_images` and `embed`."""

    def features(self: Any, images: Any) -> list[Tensor]:
        """The rows (rows, d) of each image. A newline row ends each crop of an image with
        several."""
        if torch.is_tensor(images) and images.dim() == 4:
            return list(self.encode_images(images))
        images = [image if image.dim() == 4 else image[None] for image in images]
        outputs = []
        for crops in self.encode_images(torch.cat(images)).split([len(image) for image in images]):
            if len(crops) > 1:
                line = (
                    self.model.image_newline[None, None].expand(len(crops), 1, -1).to(crops.device)
                )
                crops = torch.cat([crops, line], 1)
            outputs.append(crops.flatten(0, 1))
        return outputs

    def merge(
        self: Any, ids: Tensor, mask: Tensor | None, labels: Tensor | None, images: Any
    ) -> tuple[Any, ...]:
        """(attention mask, embeddings, labels), padded. Mask and labels are returned in the form in
        which they were given."""
        features = iter(enumerate(self.features(images), 1))
        rows = []
        for i, sample in enumerate(ids):
            kept = torch.ones_like(sample, dtype=torch.bool) if mask is None else mask[i].bool()
            words, targets = (
                sample[kept],
                (torch.full_like(sample, -100) if labels is None else labels[i])[kept],
            )
            number, unused = (None, None) if (words == PLACE).any() else next(features)
            embeds = [] if number is None else [unused[:0]]
            out = []
            owner = []
            places = (words == PLACE).nonzero()[:, 0].tolist()
            for start, stop in zip([0, *(p + 1 for p in places)], [*places, None], strict=True):
                part = slice(start, stop)
                embeds.append(self.embed(words[part]))
                out.append(targets[part])
                owner.append(torch.zeros_like(targets[part]))
                if stop is not None:
                    number, image = next(features)
                    embeds.append(image)
                    out.append(targets.new_full((len(image),), -100))
                    owner.append(targets.new_full((len(image),), number))
            longest = getattr(self.config, "tokenizer_model_max_length", None)
            rows.append([torch.cat(x)[:longest] for x in (embeds, out, owner)])
        width = max(len(r[1]) for r in rows)
        left = getattr(self.config, "tokenizer_padding_side", "right") == "left"

        def pad(x: Tensor, value: int) -> Tensor:
            gap = width - len(x)
            filling = x.new_full((gap, *x.shape[1:]), value)
            return torch.cat([filling, x] if left else [x, filling])

        embeds = torch.stack([pad(r[0], 0) for r in rows])
        attended = torch.stack([pad(torch.ones_like(r[1]), 0) for r in rows])
        if self.device.type == embeds.device.type and embeds.shape[-1] == self.config.hidden_size:
            self.truth = torch.stack([pad(r[2], 0) for r in rows])
        moved = torch.stack([pad(r[1], -100) for r in rows])
        back = None if mask is None else attended.to(mask.dtype)
        return back, embeds, None if labels is None else moved


class Meta(Merging):
    """The methods that the models of both code bases have."""

    def get_vision_tower(self: Any) -> Tower:
        return self.get_model().get_vision_tower()

    def encode_images(self: Any, images: Tensor) -> Tensor:
        return self.get_model().mm_projector(self.get_model().get_vision_tower()(images))

    def embed(self: Any, words: Tensor) -> Tensor:
        return self.get_model().embed_tokens(words)


class OldLlava(LlamaForCausalLM, Meta):
    """The interface of LLaVA."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = Body(config)
        self.post_init()

    def get_model(self) -> Body:
        return self.model

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        image_sizes=None,
    ):
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        attended, embeds, labels = self.merge(input_ids, attention_mask, labels, images)
        return None, position_ids, attended, past_key_values, embeds, labels

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        images=None,
        image_sizes=None,
        return_dict=None,
    ):
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids,
                    position_ids,
                    attention_mask,
                    past_key_values,
                    labels,
                    images,
                    image_sizes,
                )
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
        )


class OldLlavaNext(OldLlava):
    """The interface of LLaVA-NeXT: `modalities` comes before `image_sizes`, and the features of
    videos are pooled."""

    def features(self, images: Any) -> list[Tensor]:
        found = super().features(images)
        return [
            self.pooled(x) if m == "video" else x
            for x, m in zip(found, self.modalities, strict=False)
        ]

    def pooled(self, rows: Tensor) -> Tensor:
        return nn.functional.avg_pool1d(rows.T[None], 2)[0].T

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        modalities=["image"],  # noqa: B006
        image_sizes=None,
    ):
        self.modalities = [*modalities, *["image"] * 99]
        return super().prepare_inputs_labels_for_multimodal(
            input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
        )

    def forward(
        self,
        input_ids=None,
        labels=None,
        attention_mask=None,
        images=None,
        modalities=("image",),
        **more,
    ):
        _, position_ids, attention_mask, _, inputs_embeds, labels = (
            self.prepare_inputs_labels_for_multimodal(
                input_ids,
                None,
                attention_mask,
                None,
                labels,
                images,
                list(modalities),
                more.pop("image_sizes", None),
            )
        )
        ids = input_ids if inputs_embeds is None else None
        return super().forward(
            ids, attention_mask, position_ids, None, inputs_embeds, labels, **more
        )


class Connector(nn.Module):
    """A stand-in for `mm_projector`. With `queries` > 0 it mixes the rows of an image to that many
    rows."""

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.mix = nn.Linear((SIDE // PATCH) ** 2, queries) if queries else None
        self._connector = nn.Sequential(nn.Linear(SEEN, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        rows = self._connector(features)
        return rows if self.mix is None else self.mix(rows.transpose(1, 2)).transpose(1, 2)


class TinyConfig(PretrainedConfig):
    model_type = "tinyllava"

    def __init__(self, queries: int = 0, **more: Any) -> None:
        self.text_config = LlamaConfig(**text_config())
        self.image_token_index = PLACE
        self.queries = queries
        self.hidden_size = self.text_config.hidden_size
        super().__init__(**more)


class TinyLlava(PreTrainedModel, Merging):
    """The interface of TinyLLaVA: it contains a whole language model, and calls its `forward` so
    that hooks do not run."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.vision_tower = Tower()
        self.connector = Connector(config.hidden_size, config.queries)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def encode_images(self, images: Tensor) -> Tensor:
        return self.connector(self.vision_tower(images.to(self.device, self.dtype)))

    def embed(self, words: Tensor) -> Tensor:
        return self.language_model.get_input_embeddings()(words).to(self.device)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        image_sizes=None,
    ):
        if self.vision_tower is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        attended, embeds, labels = self.merge(input_ids, attention_mask, labels, images)
        return None, position_ids, attended, past_key_values, embeds, labels

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        images=None,
        image_sizes=None,
    ):
        if inputs_embeds is None:
            input_ids, _, attention_mask, _, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, None, attention_mask, None, labels, images, image_sizes
                )
            )
        return self.language_model.forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
        )


def parts(model: Any) -> tuple[nn.Module, nn.Module, Tower]:
    """The decoder, the projector and the tower of a model of any of these classes."""
    if isinstance(model, TinyLlava):
        return model.get_decoder(), model.connector, model.vision_tower
    return model.model, model.model.mm_projector, model.model.vision_tower


def build_original(kind: type = OldLlava, seed: int = 0, **config: Any) -> Any:
    """A model in float32, in training mode, with weights large enough for its layers to differ."""
    torch.manual_seed(seed)
    queries = config.pop("queries", 0)
    model = kind(
        TinyConfig(queries) if issubclass(kind, TinyLlava) else LlamaConfig(**text_config())
    )
    vars(model.config).update(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.train()


# An entry of a sample is a number of words, or a string for an image with that many crops.
SAMPLES: list[list[Any]] = [[3, "1", 5], [2, "3", "1", 4], [6], ["2", 2]]


def original_batch(
    samples: list[list[Any]] = SAMPLES, seed: int = 0, square: bool = False, **more: Any
) -> dict[str, Any]:
    """The arguments of a forward. `square` puts the images into one tensor, so each has one
    crop."""
    generator = torch.Generator().manual_seed(seed)
    rows, images = [], []
    for sample in samples:
        ids: list[int] = [1]
        for entry in sample:
            if isinstance(entry, int):
                ids += torch.randint(3, WORDS, (entry,), generator=generator).tolist()
            else:
                ids.append(PLACE)
                images.append(torch.randn(int(entry), 3, SIDE, SIDE, generator=generator))
        if PLACE not in ids:
            # This image goes through the tower, but into no row.
            images.append(torch.zeros(1, 3, SIDE, SIDE))
        rows.append(torch.tensor(ids))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    labels = ids.masked_fill((ids < 3) | (ids == PLACE), -100)
    pixels = torch.cat([image[:1] for image in images]) if square else images
    return {
        "input_ids": ids,
        "attention_mask": ids.ne(0),
        "labels": labels,
        "images": pixels,
        **more,
    }
