"""Keep the head's keys out of saved models, in every way of saving that can be reached from the
model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

IGNORED = "_keys_to_ignore_on_save"


class SavedKeys:
    """Keeps the module `model.<name>` out of `model.save_pretrained`, whether that method is
    Hugging Face's or the model's own.

    A plain object with bound methods, so that `copy.deepcopy(model)` copies it with the model.

    Args:
        model: the model that has the module.
        name: the name of the module.
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
            # PEFT models are left out, because PEFT saves only its adapters.
            vars(model)["save_pretrained"] = self._save_pretrained

    def remove(self) -> None:
        """Restore the model's own way of saving."""
        if self.before is not None:
            vars(self.model).pop(IGNORED, None)
            vars(self.model).update(self.before)
        elif getattr(vars(self.model).get("save_pretrained"), "__self__", None) is self:
            del vars(self.model)["save_pretrained"]

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """A context manager: inside it no `state_dict()` of the model, or of a module around it,
        has the module's keys."""
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
