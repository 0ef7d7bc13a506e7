"""What PRe says when it cannot do what it was attached for: every warning of the attachment, each once a training."""

from __future__ import annotations

import warnings
from typing import Any

WARNINGS = {
    "image tokens without images": "input_ids has {count} image tokens, but the forward got none of {known} (it got "
    "{got}), so they are taken for text and L_PRe has no term; if images came in another argument, pass mask_fn= to "
    "apply_pre",
}


class Notices:
    """The warnings of one handle or patch; a warning that was given is not repeated before `forget()`."""

    def __init__(self) -> None:
        self.given: set[str] = set()

    def warn(self, name: str, **values: Any) -> None:
        """Give the warning `name` of WARNINGS with these values in it, if it has not been given."""
        if name not in self.given:
            self.given.add(name)
            warnings.warn(f"PRe: {WARNINGS[name].format(**values)}", stacklevel=3)

    def forget(self) -> None:
        """A new training begins."""
        self.given.clear()
