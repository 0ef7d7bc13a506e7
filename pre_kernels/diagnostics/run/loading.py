"""Loading a vision-language model and its processor from a folder or the hub, with transformers'
own classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The value of --device that spreads a model over all GPUs, with accelerate's device_map="auto".
SPREAD = "spread"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and its processor."""

    model: Any
    processor: Any


def load(
    source: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model from a folder that `save_pretrained` wrote (a PEFT adapter's too), or by its
    name on the hub.

    Weights are read only from safetensors.

    Args:
        source: the folder or the name.
        dtype: None: as the weights are saved.
        device: a device of torch, or `SPREAD`.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        ValueError: the source is not a vision-language model, or has no processor of images and
            text.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.hub import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    more: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    placed: dict[str, Any] = {"device_map": "auto"} if device == SPREAD else {}
    where = f"model: {source}"
    if Path(source).exists() and not Path(source).is_dir():
        raise ValueError(
            f"{where} is not a folder, want one that save_pretrained wrote, or a model's name on "
            "the hub"
        )
    try:
        if find_adapter_config_file(source) is None:
            AutoConfig.from_pretrained(source, **more)
        else:
            # from_pretrained would load an adapter that is a pickle. This raises if there is no
            # safetensors file.
            cached_file(source, "adapter_model.safetensors")
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype or "auto", use_safetensors=True, **placed, **more
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{where} cannot be loaded as a vision-language model: {error}") from error
    try:
        processor: Any = AutoProcessor.from_pretrained(source, **more)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{where} has no processor that can be loaded: {error}") from error
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{where} has a {type(processor).__name__}, want a processor of images and text; save "
            "the processor there too"
        )
    return Loaded(model.eval() if placed else model.eval().to(device), processor)
