"""Text as bytes: the standard library's source code, and the question about a scene with its
answer."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .scenes import MIDDLE, PATCHES, Scenes

# These ids follow those of the 256 bytes; VOCABULARY is the number of ids.
IMAGE = 256
BEGIN = 257
VOCABULARY = 258
QUESTION = b" middle odd? "
# Tokens without a loss have this label.
IGNORED = -100


def library_source(limit: int) -> Tensor:
    """Return the first `limit` bytes of the standard library's modules in alphabetical order, as
    token ids."""
    content = bytearray()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        content += file.read_bytes()
        if len(content) >= limit:
            break
    return torch.from_numpy(np.frombuffer(bytes(content[:limit]), dtype=np.uint8).astype(np.int64))


def text_batch(corpus: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return `count` random windows of `length` tokens, each after a BEGIN."""
    start = torch.randint(len(corpus) - length, (count, 1), generator=generator)
    return torch.cat([torch.full((count, 1), BEGIN), corpus[start + torch.arange(length)]], dim=1)


def visual_batch(scenes: Scenes, index: Tensor) -> dict[str, Tensor]:
    """Return the model's arguments for some scenes: image, question, answer. Only the answer is a
    label.

    The question is narrow on purpose: it asks for one bit about one of the nine digits.
    """
    prompt = torch.tensor([BEGIN] + [IMAGE] * PATCHES + list(QUESTION))
    yes, no = torch.tensor(list(b"yn"))
    answer = torch.where(scenes.digits[index, MIDDLE] % 2 == 1, yes, no)
    input_ids = torch.cat([prompt.expand(len(index), -1), answer[:, None]], dim=1)
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, -1] = answer
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": scenes.images[index],
        "labels": labels,
    }
