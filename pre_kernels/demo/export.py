"""Write the demo's results as files: models with their processors, and images for `pre-kernels
diagnose`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from pre_kernels.diagnostics.measures.state import of_system
from pre_kernels.screen import why

from .scenes import MIDDLE, OBJECTS, PATCH, SIDE, drawn, masks, split_digits
from .text import BEGIN, IMAGE

# This many scenes of each digit are written as files. A quarter of all scenes test the probe, and a
# report says that fewer than 100 are too few.
SCENES = 40


def processor() -> LlavaProcessor:
    """Return the model's processor: a token for each byte, images unchanged in 0..1, the demo's
    question as chat."""
    # A character stands for each byte.
    characters = pre_tokenizers.ByteLevel.alphabet()
    names = {_byte(c): c for c in characters}
    tokenizer = Tokenizer(models.BPE(vocab={names[i]: i for i in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = {"<image>": IMAGE, "<s>": BEGIN}
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in added])
    assert {name: tokenizer.token_to_id(name) for name in added} == added
    # This import stands here because it prints that torchvision would be faster.
    from transformers import CLIPImageProcessor

    fast: Any = PreTrainedTokenizerFast
    images: Any = CLIPImageProcessor
    llava: Any = LlavaProcessor
    made: LlavaProcessor = llava(
        image_processor=images(
            size={"height": SIDE, "width": SIDE},
            do_center_crop=False,
            do_normalize=False,
            do_convert_rgb=True,
        ),
        tokenizer=fast(
            tokenizer_object=tokenizer, bos_token="<s>", additional_special_tokens=["<image>"]
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "<s>{% for message in messages %}{% for part in message.content %}"
            "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
        ),
    )
    return made


class Kept:
    """The folder of a seed's models and scenes.

    A disk that does not take a file does not stop the seed, which still returns what it measured.

    Attributes:
        problems: why files could not be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def model(self, model: Any, arm: str) -> None:
        """Save a model, and with the first one the scenes of seed 0, which no training saw."""
        if arm == "before":
            scenes = self.folder / "scenes"
            self._write(scenes, lambda: save_scenes(split_digits(0)[2], SCENES, 0, scenes))
        path = self.folder / "models" / arm
        self._write(path, lambda: save_model(model, path))

    def _write(self, path: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, SafetensorError) as error:
            self.problems.append(why(of_system(error), path))


def save_model(model: Any, folder: Path) -> None:
    """Save the files that `from_pretrained` and `pre-kernels diagnose` read."""
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


def save_scenes(sources: np.ndarray, each: int, seed: int, folder: Path) -> None:
    """Write `each` scenes for each digit to images/<digit>/*.png, with their masks in masks/. The
    digit fills the middle and four more cells.

    Args:
        sources: the digit images to draw from, as numbers in scikit-learn's set.
    """
    from sklearn.datasets import load_digits

    target = load_digits().target
    generator = np.random.default_rng(seed)
    for digit in range(10):
        chosen = generator.choice(sources, (each, OBJECTS))
        for scene in chosen:
            cells = [
                MIDDLE,
                *generator.choice([c for c in range(OBJECTS) if c != MIDDLE], 4, replace=False),
            ]
            scene[cells] = generator.choice(sources[target[sources] == digit], 5)
        for number, pixels in enumerate(
            (drawn(chosen)[:, 0] * 255).round().to(torch.uint8).numpy()
        ):
            for kind, content in (("images", pixels), ("masks", _objects())):
                path = folder / kind / str(digit) / f"{number:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)


def _objects() -> np.ndarray:
    """Return the number of the object at each pixel, from 1."""
    number = (
        (masks() * torch.arange(1, OBJECTS + 1)[:, None]).sum(0).view(SIDE // PATCH, SIDE // PATCH)
    )
    return number.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1).to(torch.uint8).numpy()


def _byte(character: str) -> int:
    """Return the byte for which a character of the byte-level alphabet stands. Printable characters
    stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    code = ord(character)
    return code if code < 256 else rest[code - 256]
