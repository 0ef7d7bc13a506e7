"""Loading a vision-language model and its processor from a folder or the hub, with transformers'
own classes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pre_kernels import screen

# The value of --device that spreads a model over all GPUs, with accelerate's device_map="auto".
SPREAD = "spread"
# A hub's names have at most one slash: "model" or "owner/model".
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Seconds that the hub may take to answer.
PATIENCE = 10.0


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and its processor."""

    model: Any
    processor: Any


def check_sources(sources: Sequence[str]) -> None:
    """Find each model, in the file system first, before anything is loaded.

    Raises:
        ValueError: a folder is missing or holds no model, or the hub has no model of this name or
            does not answer.
    """
    names = [source for source in sources if not _is_folder(source)]
    for name in names:
        _ask_hub(name)


def _is_folder(source: str) -> bool:
    """Whether the source is a folder with a model. False for a name that only the hub can know."""
    folder = Path(source)
    where = f"model: {source}"
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
            found = (
                f"; it has {', '.join(checkpoints[-3:])}: give one of them" if checkpoints else ""
            )
            raise ValueError(
                f"{where} is a folder without config.json or adapter_config.json, want one that "
                f"save_pretrained wrote{found}"
            )
        return True
    if folder.exists():
        raise ValueError(
            f"{where} is not a folder, want one that save_pretrained wrote, or a model's name on "
            "the hub"
        )
    # "out/with" may be a path or a name, and is a path if there is a folder "out".
    if not HUB_NAME.fullmatch(source) or ("/" in source and folder.parent.is_dir()):
        raise ValueError(f"{where} is not there, want a folder{_near(folder)}")
    return False


def _near(path: Path) -> str:
    """The end of a message that names what is there instead of `path`, or nothing."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [each.name for each in parent.iterdir()])
    return f"; did you mean {parent / near[0]}?" if near else ""


def _ask_hub(name: str) -> None:
    """Ask once and wait a few seconds. Loading would ask for each file, several times."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    files = ("config.json", "adapter_config.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return
    where = f"model: {name} is not a folder here, and"
    try:
        HfApi().model_info(name, timeout=PATIENCE)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{where} the hub has no such model, or only for those who log in (hf auth login), "
            f"want a folder or a model's name{_near(Path(name))}"
        ) from error
    except Exception as error:
        # The errors of a connection are those of an HTTP library, which differs by version.
        raise ValueError(
            f"{where} the hub does not answer ({first_line(error)}), want a folder, or a connection"
            f"{_near(Path(name))}"
        ) from error


def first_line(error: Exception) -> str:
    """The text of an error of transformers. Its further lines are advice on other uses, or a list
    of all models."""
    return str(error).strip().partition("\n")[0]


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
        ValueError: the source is not there, is not a vision-language model, or has no processor of
            images and text.
    """
    with screen.starting("the same command resumes from what is saved"):
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
        from transformers.utils.hub import cached_file
        from transformers.utils.peft_utils import find_adapter_config_file

    more: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    placed: dict[str, Any] = {"device_map": "auto"} if device == SPREAD else {}
    where = f"model: {source}"
    check_sources([source])
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
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"trust_remote_code: got False for {source}, which brings code of its own, want "
                "True (--trust-remote-code) if you trust it"
            ) from error
        raise ValueError(
            f"{where} cannot be loaded as a vision-language model: {first_line(error)}; want one "
            "that AutoModelForImageTextToText loads"
        ) from error
    try:
        processor: Any = AutoProcessor.from_pretrained(source, **more)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{where} has no processor that can be loaded: {first_line(error)}; save it there with "
            "processor.save_pretrained(folder)"
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{where} has a {type(processor).__name__}, want a processor of images and text; save "
            "the processor there too"
        )
    return Loaded(model.eval() if placed else model.eval().to(device), processor)
