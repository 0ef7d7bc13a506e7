"""What PRe says when it cannot do what it was attached for: every warning of the attachment, each once a training."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

WARNINGS = {
    "image tokens without images": "input_ids has {count} image tokens, but the forward got none of {known} (it got "
    "{got}), so they are taken for text and L_PRe has no term; if images came in another argument, pass mask_fn= to "
    "apply_pre",
    "images without image tokens": "the forward got {got}, but input_ids has none of the image tokens {tokens} that "
    "the model's config names, nor had it in the {count} forwards with images before, so L_PRe has no term; set "
    "image_token_id in model.config to the id that stands for images in input_ids, or pass mask_fn= to apply_pre",
    "attention mask of another form": "attention_mask is {what}, a form that PRe cannot read, so all visual tokens "
    "count, those of padding and dummy images too; it reads (batch, tokens), (batch or 1, heads or 1, tokens, tokens) "
    "of bool or float, and dicts of such masks; pass mask_fn= to apply_pre if some must not count",
}


class Notices:
    """The warnings of one handle or patch; a warning that was given is not repeated before `forget()`."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        self.turns: Counter[str] = Counter()

    def warn(self, name: str, **values: Any) -> None:
        """Give the warning `name` of WARNINGS with these values in it, if it has not been given."""
        if name not in self.given:
            self.given.add(name)
            warnings.warn(f"PRe: {WARNINGS[name].format(**values)}", stacklevel=3)

    def settle(self, name: str) -> None:
        """The warning `name` is not to be given in this training."""
        self.given.add(name)

    def turn(self, name: str) -> int:
        """1, 2, ... in a training: how often the cause of the warning `name` has been looked for, or found."""
        self.turns[name] += 1
        return self.turns[name]

    def forget(self) -> None:
        """A new training begins."""
        self.given.clear()
        self.turns.clear()
