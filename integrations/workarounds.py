"""Workarounds for faults of other libraries. Each can be deleted when its fault is mended.

**Weights under renamed keys are not resumed** (`names_given`, `load_renamed`). In many families of
vision-language models `save_pretrained` renames keys (`model.language_model.layers…` is saved as
`language_model.model.layers…`). `transformers.Trainer` reads a checkpoint with
`load_state_dict(..., strict=False)`, and without the renaming that `from_pretrained` does. So it
leaves these weights out, with a warning in the log, and resumes from the weights that the model was
made with. Seen in transformers 5.24. The workaround can be deleted when the oldest supported
transformers loads renamed keys in `Trainer._load_from_checkpoint` and `Trainer._load_best_model`.
`test_four_and_four_steps_are_eight` in `tests/integrations/test_features.py` then passes without
it.
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
    """Collect the names of the tensors that `model` is given to load inside the block, whatever
    files they come from. The set is complete at the end."""
    names: set[str] = set()

    def nothing_missing(module: Any, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if ATTRIBUTE not in key.split(".")]

    hooks = [
        model.register_load_state_dict_pre_hook(lambda module, state, *_: names.update(state)),
        model.register_load_state_dict_post_hook(nothing_missing),  # the head has its own file
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def load_renamed(model: Any, folder: str, names: set[str]) -> None:
    """Load into `model` the tensors of the checkpoint in `folder` that the Trainer left out.
    Parameters that the checkpoint does not hold keep their values.

    Args:
        model: the model that the Trainer has loaded the checkpoint into.
        folder: the checkpoint.
        names: the names of the tensors that the Trainer gave the model.

    Raises:
        RuntimeError: if the checkpoint cannot be read by `from_pretrained`, or holds tensors that
            the model has no place for.
    """
    if not hasattr(type(model), "from_pretrained") or hasattr(model, "peft_config"):
        return
    own = model.state_dict().keys()
    if names <= own:
        return
    if not any(
        name.startswith("model") and name.endswith(".safetensors") for name in os.listdir(folder)
    ):
        # Everything but the head was loaded; the other names belong to buffers of older versions.
        if all(ATTRIBUTE in name.split(".") for name in own - names):
            return
        kind = type(model).__name__
        raise RuntimeError(
            f"PRe: {folder} has no model.safetensors but weights under names that changed on "
            f"saving, such as {min(names - own)!r}, which the Trainer leaves out; call "
            f"{kind}.from_pretrained(folder).save_pretrained(folder) before resuming, and set "
            "save_safetensors=True in training"
        )
    wide = torch.promote_types(model.dtype, torch.float32)
    loaded, info = type(model).from_pretrained(
        folder, dtype=wide, use_safetensors=True, output_loading_info=True
    )
    absent = set(info["missing_keys"])  # from_pretrained initialised these at random
    tensors = {name: tensor for name, tensor in loaded.state_dict().items() if name not in absent}
    result = model.load_state_dict(tensors, strict=False)
    # Modules that the user added were loaded by the Trainer under their own names.
    lost = (set(info["unexpected_keys"]) - (names & own)) | set(result.unexpected_keys)
    if lost:
        raise RuntimeError(
            f"PRe: {folder} holds tensors that were not loaded into this model: {sorted(lost)}; "
            "resume with the class and config of that checkpoint"
        )
