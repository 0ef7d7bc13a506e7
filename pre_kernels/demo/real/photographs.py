"""Photographs of single things with a transparent surround, in categories, with names."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# The folders of tuxpaint-stamps-default with 30 photographs or more each of things of one kind.
# Each name is one token of the LLMs used here.
CATEGORIES = ("animals", "food", "household", "plants", "town", "vehicles")
# The side of a thing in a scene is at most so many pixels.
LARGEST = 112
# A longer name is a sentence.
LONGEST_NAME = 40
# The parts of the photographs of each category: to train on, and two halves to measure on.
SHARES = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class Photograph:
    """A thing: the index of its category, its name in English, and its RGBA picture."""

    category: int
    name: str
    picture: Image.Image


class Unreadable(ValueError):
    """Too few photographs could be read."""


def load(folder: Path) -> tuple[list[Photograph], list[str]]:
    """Return the photographs under `folder`, in a fixed order, and the paths of files that could
    not be read."""
    found = []
    broken = []
    for category, name in enumerate(CATEGORIES):
        for path in sorted((folder / name).rglob("*.png")):
            if path.stem.endswith("_mirror"):
                continue
            title = _title(path.with_suffix(".txt"))
            if not title:
                continue
            try:
                with Image.open(path) as image:
                    picture = image.convert("RGBA")
            except (OSError, ValueError, SyntaxError):
                broken.append(str(path))
                continue
            picture = picture.crop(picture.getchannel("A").getbbox())
            picture.thumbnail((LARGEST, LARGEST))
            found.append(Photograph(category, title, picture))
    for category, name in enumerate(CATEGORIES):
        count = sum(photograph.category == category for photograph in found)
        if count < FEWEST:
            raise Unreadable(
                f"{folder / name}: got {count} photographs that can be read, want {FEWEST} or "
                f"more; remove {folder}, then pre-kernels demo --real --fetch"
            )
    return found, broken


# Each part of a category has at least two.
FEWEST = 10


def _title(path: Path) -> str:
    """Return the English name, or "" where there is none that is short enough."""
    try:
        first = path.read_text(encoding="utf-8", errors="ignore").partition("\n")[0]
    except OSError:
        return ""
    title = first.strip().rstrip(".!").lower()
    return title if len(title) <= LONGEST_NAME else ""


def split(photographs: list[Photograph], seed: int) -> list[list[Photograph]]:
    """Return disjoint parts of the photographs, each with all categories, by `SHARES`."""
    chance = random.Random(seed)
    parts: list[list[Photograph]] = [[] for _ in SHARES]
    for category in range(len(CATEGORIES)):
        own = [p for p in photographs if p.category == category]
        chance.shuffle(own)
        start = 0
        for number, share in enumerate(SHARES):
            last = number == len(SHARES) - 1
            end = len(own) if last else start + round(share * len(own))
            parts[number] += own[start:end]
            start = end
    return parts
