"""What PRe says when it cannot do what it was attached for: every warning of the attachment, each once a training."""

from __future__ import annotations

import warnings
from typing import Any

WARNINGS = {
    "image tokens without images": "input_ids has {count} image tokens, but the forward got none of {known} (it got "
    "{got}), so they are taken for text and L_PRe has no term; if images came in another argument, pass mask_fn= to "
    "apply_pre",
    "launched own loop": "the first optimizer step was outside of a transformers.Trainer, and the launcher attaches to "
    "the models of those alone, so this training has no PRe; in a loop of your own write `apply_pre(model)` before the "
    "optimizer is made, which needs no launcher",
    "launched no images": "{trainer} trains {model}, which is no vision-language model as far as its config says "
    "(neither vision_config nor image_token_id), so this training has no PRe; if it sees images, give the launcher "
    "--set mask_fn=module:function, which finds its visual tokens (see apply_pre)",
    "launched unseen": "{trainer} trains {model} without PRe, because Trainer.__init__ and Trainer.train, by which the "
    "launcher attaches, were replaced after it was started; write `apply_pre(model)` before the Trainer is made",
    "launched without terms": "{model} was trained and no batch had a term of PRe: had it visual tokens?",
    "launched nothing": "nothing was trained with PRe: in this process the script trained no vision-language model by "
    "a transformers.Trainer; if it did in others that the launcher cannot follow ({started}), start those by `{line}`",
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
