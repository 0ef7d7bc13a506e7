"""What a saved model holds: the keys it has without PRe, wherever the way of saving can be
reached."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

IGNORED = "_keys_to_ignore_on_save"


class SavedKeys:
    """Keeps `model.<name>` out of `model.save_pretrained`, of Hugging Face's kind or the model's
    own.

    A plain object with bound methods, so that `copy.deepcopy(model)` copies it with the model.

    Args:
        model: it has the module.
        name: of the module.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name
        self.before: dict[str, Any] | None = None
        kind = type(model)
        if hasattr(kind, IGNORED):
            self.before = {k: v for k, v in vars(model).items() if k == IGNORED}
            keys = {f"{name}.{key}" for key in getattr(model, name).state_dict()}
            ignored: Any = getattr(model, IGNORED)
            vars(model)[IGNORED] = set(ignored or ()) | keys
        elif callable(getattr(kind, "save_pretrained", None)) and not hasattr(model, "peft_config"):
            # (PEFT's saves its adapters alone.)
            vars(model)["save_pretrained"] = self._save_pretrained

    def remove(self) -> None:
        """Put the model's own way of saving back."""
        if self.before is not None:
            vars(self.model).pop(IGNORED, None)
            vars(self.model).update(self.before)
        elif getattr(vars(self.model).get("save_pretrained"), "__self__", None) is self:
            del vars(self.model)["save_pretrained"]

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Inside it no `state_dict()` of the model, or of what it is in, has the module's keys."""
        hook = self.model.register_state_dict_post_hook(functools.partial(self._leave_out))
        try:
            yield
        finally:
            hook.remove()

    def _leave_out(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}{self.name}.")]:
            del state[key]

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        with self.excluded():
            return type(self.model).save_pretrained(self.model, *args, **kwargs)  # type: ignore[attr-defined]
