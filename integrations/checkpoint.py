"""The head on disk: a safetensors file and a small JSON file beside it. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .handle import PreHandle

WEIGHTS = "pre_head.safetensors"
CONFIG = "pre_head.json"
FORMAT = 1


def save(handle: PreHandle, directory: str | os.PathLike[str]) -> None:
    """Write `handle`'s head to `directory`, which is made if need be; a file is replaced whole or not at all.

    Raises:
        RuntimeError: if the head is sharded and its parameters are not whole.
    """
    from safetensors.torch import save_file

    os.makedirs(directory, exist_ok=True)
    tensors = {}
    for name, tensor in _module(handle).state_dict().items():
        if hasattr(tensor, "full_tensor") or tensor.numel() == 0:
            raise RuntimeError(
                f"head: `{name}` is sharded; gather the parameters first, or save with your sharding library"
            )
        tensors[name] = tensor.detach().cpu().contiguous()
    config = {"format": FORMAT, "pre_kernels": _version(), **describe(handle)}

    weights, settings = os.path.join(directory, WEIGHTS), os.path.join(directory, CONFIG)
    save_file(tensors, weights + ".part")
    with open(settings + ".part", "w") as file:
        json.dump(config, file, indent=2)
        file.write("\n")
    os.replace(weights + ".part", weights)
    os.replace(settings + ".part", settings)


def load(handle: PreHandle, directory: str | os.PathLike[str]) -> None:
    """Copy the head in `directory` into `handle`'s, cast to its dtype.

    Raises:
        FileNotFoundError: if the directory or a file is missing.
        ValueError: if a file is broken, or describes another head (layers, widths, loss, activation, ...).
    """
    if not os.path.isdir(directory):
        raise FileNotFoundError(
            f"directory: {os.fspath(directory)!r} is no directory; want one that handle.save() wrote"
        )
    paths = {name: os.path.join(directory, name) for name in (CONFIG, WEIGHTS)}
    for path in paths.values():
        if not os.path.isfile(path):
            raise FileNotFoundError(f"directory: {path!r} is missing; want both {CONFIG} and {WEIGHTS}")

    config = _read_config(paths[CONFIG])
    for name, wanted in describe(handle).items():
        if config.get(name) != wanted:
            raise ValueError(f"{name}: {paths[CONFIG]!r} says {config.get(name)!r}, this handle has {wanted!r}")

    found = _read_weights(paths[WEIGHTS])
    mine = _module(handle).state_dict()
    if found.keys() != mine.keys():
        raise ValueError(f"{paths[WEIGHTS]!r}: holds {sorted(found)}, this head has {sorted(mine)}")
    for name, tensor in found.items():
        if tensor.shape != mine[name].shape:
            raise ValueError(
                f"{paths[WEIGHTS]!r}: `{name}` has shape {tuple(tensor.shape)}, this head's {tuple(mine[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in found.items():
            mine[name].copy_(tensor)


def describe(handle: PreHandle) -> dict[str, Any]:
    """What must agree between a head on disk and a handle."""
    head: Any = _module(handle)
    one = head[0] if isinstance(head, nn.ModuleList) else head
    return {
        **handle.settings(),
        "dim": one.dim,
        "hidden_dim": one.hidden_dim,
        "out_dim": one.out_dim,
        "bias": one.b1 is not None,
        "activation": one.activation,
        "loss": one.loss,
    }


def _module(handle: PreHandle) -> nn.Module:
    """The head itself; PEFT's modules_to_save wraps it and trains a copy."""
    head = handle.head
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head


def _read_config(path: str) -> dict[str, Any]:
    try:
        with open(path) as file:
            config = json.load(file)
    except ValueError as error:  # both JSON and unicode errors are
        raise ValueError(f"{path!r}: no valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path!r}: format {got!r}, want {FORMAT}")
    return config


def _read_weights(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path!r}: no valid safetensors file: {error}") from error


def _version() -> str:
    import pre_kernels

    return pre_kernels.__version__
