"""The state of an interrupted stream of measurements, in a safetensors file. Nothing is pickled."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = 1
KIND = "__kind__"


def save(path: Path, value: Any, classes: tuple[type, ...]) -> None:
    """Write `value` to `path`, whole or not at all.

    It may consist of None, bool, int, float, str, list, tuple, dict, tensors, random.Random and
    objects of `classes`, whose attributes consist of the same. Tensors that share memory are
    written separately.

    Raises:
        TypeError: `value` contains something else.
        OSError: the file cannot be written. It names `path`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    described = json.dumps(_describe(value, {kind: kind.__name__ for kind in classes}, tensors))
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, {"version": str(VERSION), "value": described})
        # safetensors makes a file that its owner alone can read. Some file systems have no modes.
        with contextlib.suppress(OSError):
            partial.chmod(mode)
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        # What is there of it takes space on a full disk.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        refused = of_system(error)
        refused.filename = str(path)
        raise refused from error


def of_system(error: Exception) -> OSError:
    """The error as an OSError. safetensors has its own, with the number of one in its text."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"(?:os error|code:) (\d+)", str(error))
    if found is None:
        return OSError(errno.EIO, str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])))


def load(path: Path, classes: tuple[type, ...], device: torch.device | str = "cpu") -> Any:
    """Read what `save` wrote. Tensors that were not on the CPU are then on `device`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, has another version, or holds something else. The message
            names it.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.get("version") != str(VERSION):
            raise ValueError(
                f"has version {about.get('version')}, want {VERSION}; {_remedy(about)}"
            )
        return _restore(
            json.loads(about["value"]), {kind.__name__: kind for kind in classes}, tensors
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read, so the run cannot resume: {error}") from error


def _remedy(about: Mapping[str, str]) -> str:
    """What to do about a file of another version, of which this is the metadata."""
    number = about.get("version", "")
    if number.isdecimal() and int(number) > VERSION:
        return "a newer version of pre-kernels wrote it, upgrade, or delete it to start again"
    return "an older version of pre-kernels, or another program, wrote it; delete it to start again"


def _describe(value: Any, classes: Mapping[type, str], tensors: dict[str, Tensor]) -> Any:
    def within(inner: Any) -> Any:
        return _describe(inner, classes, tensors)

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if torch.is_tensor(value):
        name = str(len(tensors))
        # safetensors refuses tensors that share memory and views of larger tensors, so clone.
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {KIND: "tensor", "name": name, "cpu": value.device.type == "cpu"}
    if isinstance(value, list):
        return [within(item) for item in value]
    if isinstance(value, tuple):
        return {KIND: "tuple", "items": [within(item) for item in value]}
    # JSON allows only strings as keys, so a dict becomes a list of pairs.
    if isinstance(value, dict):
        return {KIND: "dict", "items": [[within(key), within(item)] for key, item in value.items()]}
    if isinstance(value, random.Random):
        return {KIND: "random", "state": within(value.getstate())}
    if type(value) in classes:
        return {
            KIND: classes[type(value)],
            "fields": {name: within(item) for name, item in vars(value).items()},
        }
    raise TypeError(
        f"value: got a {type(value).__name__} in it, want numbers, tensors, containers of them, or "
        f"{classes}"
    )


def _restore(value: Any, classes: Mapping[str, type], tensors: Mapping[str, Tensor]) -> Any:
    def within(inner: Any) -> Any:
        return _restore(inner, classes, tensors)

    if isinstance(value, list):
        return [within(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value[KIND]
    if kind == "tensor":
        tensor = tensors[value["name"]]
        return tensor.cpu() if value["cpu"] else tensor
    if kind == "tuple":
        return tuple(within(item) for item in value["items"])
    if kind == "dict":
        return {within(key): within(item) for key, item in value["items"]}
    if kind == "random":
        generator = random.Random()
        generator.setstate(within(value["state"]))
        return generator
    made: Any = object.__new__(classes[kind])
    made.__dict__.update({name: within(item) for name, item in value["fields"].items()})
    return made
