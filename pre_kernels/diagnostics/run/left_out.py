"""Images and masks that a run cannot use: the reasons, and how they are named and counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

# The reasons for which an image is left out, and those for which only its mask is.
IMAGES = {
    "unreadable": "images that could not be read",
    "refused": "images that the model's processor refused",
}
MASKS = {
    "mask_unreadable": "masks that could not be read",
    "mask_size": "masks of another size than their image",
    "mask_empty": "masks without an object",
}
REASONS = IMAGES | MASKS
# How many of each reason are named on the screen. All names are in diagnosis.json.
NAMED = 3


class Unusable(ValueError):
    """Raised for an image or a mask that is left out, while others can be used. `reason` is a key
    of `REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Tally:
    """Counts what is left out, and says the first `NAMED` of each reason one by one.

    `left_out` is a list of (name, reason), which an earlier run may have begun.
    """

    def __init__(self, left_out: list[tuple[str, str]], say: Callable[[str], None]) -> None:
        self.left_out = left_out
        self.say = say

    def add(self, name: str, error: Unusable) -> None:
        """Count the image of this name, or its mask, and say so if it is among the first."""
        before = sum(reason == error.reason for _, reason in self.left_out)
        self.left_out.append((name, error.reason))
        if before < NAMED:
            self.say(str(error))
        elif before == NAMED:
            self.say(f"more {REASONS[error.reason]}, only counted from here on")

    def close(self) -> None:
        """Say how many there are of the reasons of which not all were named."""
        for text, names in by_reason(self.left_out).items():
            if len(names) > NAMED:
                self.say(f"{len(names)} {text}")


def by_reason(left_out: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names for each reason in words, in the order of `REASONS`, each name once."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for name, reason in left_out:
        names[reason][name] = None
    return {text: [*names[reason]] for reason, text in REASONS.items() if reason in names}


def counted(left_out: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason: how many were left out for it, and the first names."""
    return [
        f"{text}: {len(names)} ({', '.join(names[:NAMED])}{', …' * (len(names) > NAMED)})"
        for text, names in by_reason(left_out).items()
    ]


def images_of(left_out: Iterable[tuple[str, str]]) -> set[str]:
    """The names of the images that are left out themselves, and not only their masks."""
    return {name for name, reason in left_out if reason in IMAGES}


def none_left(folder: object, number: int, left_out: Iterable[tuple[str, str]]) -> str:
    """The message if none of the `number` images in `folder` is left."""
    reasons = "; ".join(counted(left_out))
    return f"images: none of the {number} in {folder} can be used: {reasons}"
