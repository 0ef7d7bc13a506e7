"""What makes up for a fault of another library, to be deleted when that is gone.

**Weights under renamed keys are not resumed** (`names_given`, `load_renamed`). In many families of
vision-language models `save_pretrained` renames keys (`model.language_model.layers…` is saved as
`language_model.model.layers…`). `transformers.Trainer` reads a checkpoint with
`load_state_dict(..., strict=False)` and without the renaming that `from_pretrained` does, so it
leaves these weights out, with a warning in the log, and resumes from those the model was made with.
Seen in transformers 5.24. It can go when the oldest transformers that is supported loads renamed
keys in `Trainer._load_from_checkpoint` and `Trainer._load_best_model`: without it
`test_four_and_four_steps_are_eight` in `tests/integrations/test_features.py` then still passes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from .handle import ATTRIBUTE


@contextlib.contextmanager
def names_given(model: Any) -> Iterator[set[str]]:
    """The names of the tensors that `model` is given to load, known at the end, whatever the files
    they are in."""
    names: set[str] = set()

    def nothing_missing(module: Any, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if ATTRIBUTE not in key.split(".")]

    hooks = [
        model.register_load_state_dict_pre_hook(lambda module, state, *_: names.update(state)),
        model.register_load_state_dict_post_hook(nothing_missing),  # the head has a file of its own
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def load_renamed(model: Any, folder: str, names: set[str]) -> None:
    """Load into `model` what the Trainer left out of the checkpoint in `folder`, after it was given
    the tensors `names`. What the checkpoint does not hold stays as it is.

    Raises:
        RuntimeError: if the checkpoint cannot be read so, or holds what the model has no place for.
    """
    if not hasattr(type(model), "from_pretrained") or hasattr(model, "peft_config"):
        return
    own = model.state_dict().keys()
    if names <= own:
        return
    if not any(
        name.startswith("model") and name.endswith(".safetensors") for name in os.listdir(folder)
    ):
        # all of the model was given, and what is left over was a buffer once
        if all(ATTRIBUTE in name.split(".") for name in own - names):
            return
        kind = type(model).__name__
        raise RuntimeError(
            f"PRe: {folder} has no model.safetensors but weights under names that changed on "
            f"saving, such as {min(names - own)!r}, which the Trainer leaves out; want "
            f"{kind}.from_pretrained(folder).save_pretrained(folder) before resuming, and "
            "save_safetensors=True in training"
        )
    wide = torch.promote_types(model.dtype, torch.float32)
    loaded, info = type(model).from_pretrained(
        folder, dtype=wide, use_safetensors=True, output_loading_info=True
    )
    absent = set(info["missing_keys"])  # from_pretrained made them up
    tensors = {name: tensor for name, tensor in loaded.state_dict().items() if name not in absent}
    result = model.load_state_dict(tensors, strict=False)
    # the Trainer has loaded modules that the user added, under their own names
    lost = (set(info["unexpected_keys"]) - (names & own)) | set(result.unexpected_keys)
    if lost:
        raise RuntimeError(
            f"PRe: {folder} holds tensors that were not loaded into this model: {sorted(lost)}"
        )
