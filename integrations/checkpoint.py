"""The head on disk: a safetensors file and a small JSON file beside it. Nothing is ever
unpickled."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .distributed import Whole, rank, together, unwrapped

if TYPE_CHECKING:
    from .handle import PreHandle

WEIGHTS = "pre_head.safetensors"
CONFIG = "pre_head.json"
FORMAT = 1
LATER = ("weighting",)  # settings that files of the same format may lack


def save(
    handle: PreHandle,
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    writes: bool | None = None,
) -> None:
    """Write `handle`'s head to `directory`, which is made if need be; a file is replaced whole or
    not at all.

    See `PreHandle.save`; `writes`: whether this process writes, None: if it is rank 0.
    """
    whole = _whole(handle, model)
    if writes is None:
        writes = rank() == 0
    with together(whole.collective):
        if writes:
            os.makedirs(directory, exist_ok=True)
    if not (writes or whole.collective):
        return
    tensors = whole.read(keep=writes)
    with together(whole.collective):
        if writes:
            _write(
                directory,
                tensors,
                {"format": FORMAT, "pre_kernels": _version(), **describe(handle)},
            )


def load(
    handle: PreHandle, directory: str | os.PathLike[str], model: nn.Module | None = None
) -> None:
    """Copy the head in `directory` into `handle`'s, cast to its dtype. See `PreHandle.load`."""
    whole = _whole(handle, model)
    with together(whole.collective):
        tensors = _read(handle, directory)
    whole.write(tensors)


def _whole(handle: PreHandle, model: nn.Module | None) -> Whole:
    return Whole(_module(handle), _shapes(handle), model, handle.model)


def _write(
    directory: str | os.PathLike[str], tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    weights, settings = os.path.join(directory, WEIGHTS), os.path.join(directory, CONFIG)
    save_file(tensors, weights + ".part")
    with open(settings + ".part", "w") as file:
        json.dump(config, file, indent=2)
        file.write("\n")
    os.replace(weights + ".part", weights)
    os.replace(settings + ".part", settings)


def _read(handle: PreHandle, directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors in `directory`, which are those of this handle's head."""
    if not os.path.isdir(directory):
        raise FileNotFoundError(
            f"directory: {os.fspath(directory)!r} is no directory; want one that handle.save() wrote"
        )
    paths = {name: os.path.join(directory, name) for name in (CONFIG, WEIGHTS)}
    for path in paths.values():
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"directory: {path!r} is missing; want both {CONFIG} and {WEIGHTS}"
            )

    config = _read_config(paths[CONFIG])
    for name, wanted in describe(handle).items():
        if config.get(name) != wanted and not (name in LATER and name not in config):
            raise ValueError(
                f"{name}: {paths[CONFIG]!r} says {config.get(name)!r}, this handle has {wanted!r}"
            )

    found, shapes = _read_weights(paths[WEIGHTS]), _shapes(handle)
    if found.keys() != shapes.keys():
        raise ValueError(
            f"{paths[WEIGHTS]!r}: holds {sorted(found)}, this head has {sorted(shapes)}"
        )
    for name, tensor in found.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{paths[WEIGHTS]!r}: `{name}` has shape {tuple(tensor.shape)}, this head's {shapes[name]}"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{paths[WEIGHTS]!r}: `{name}` has dtype {tensor.dtype}, want floating point"
            )
    return found


def describe(handle: PreHandle) -> dict[str, Any]:
    """What must agree between a head on disk and a handle."""
    one = next(iter(_heads(handle).values()))
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
    return (
        head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head
    )


def _heads(handle: PreHandle) -> dict[str, Any]:
    """Each `PreHead` by the prefix of its parameters' names."""
    head = unwrapped(_module(handle))
    several = isinstance(head, nn.ModuleList)
    return {f"{i}.": unwrapped(h) for i, h in enumerate(head)} if several else {"": head}


def _shapes(handle: PreHandle) -> dict[str, tuple[int, ...]]:
    """Of the whole parameters by name, however they are split."""
    found: dict[str, tuple[int, ...]] = {}
    for prefix, head in _heads(handle).items():
        found |= {
            f"{prefix}w1": (head.hidden_dim, head.dim),
            f"{prefix}w2": (head.out_dim, head.hidden_dim),
        }
        if head.b1 is not None:
            found |= {f"{prefix}b1": (head.hidden_dim,), f"{prefix}b2": (head.out_dim,)}
    return found


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
