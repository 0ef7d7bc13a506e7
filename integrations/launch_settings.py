"""The launcher's settings: their names, and their values from a file and from options.

Modules that import torch are imported when they are needed, since that takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

# These settings name modules of the model, so they cannot be checked before the model exists.
OF_THE_MODEL = ("text_model", "layers")


@functools.cache
def parameters() -> dict[str, inspect.Parameter]:
    """The settings: the keywords of `apply_pre`."""
    from .attach import apply_pre

    return {n: p for n, p in inspect.signature(apply_pre).parameters.items() if n != "model"}


def short_options(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The names and texts of the settings that were given by `--layer` and `--weight`."""
    values = ((name, getattr(options, name)) for name in ("layer", "weight"))
    return [(name, value) for name, value in values if value is not None]


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Put `sys.argv` and `sys.path` back at the end."""
    argv = sys.argv
    path = list(sys.path)
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path


def checked_head(folder: str | None) -> str | None:
    """`folder`, after a check that it has the files of a saved head."""
    if folder is None:
        return None
    from .checkpoint import CONFIG, WEIGHTS

    for name in (CONFIG, WEIGHTS):
        if not os.path.isfile(path := os.path.join(folder, name)):
            raise ValueError(f"--head: {path!r} is missing; want a folder that handle.save() wrote")
    return folder


def read_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `apply_pre`, checked as far as possible without the model."""
    import yaml

    values: dict[str, Any] = {}
    if options.config is not None:
        config = _config(options.config)
        where = f"--config {options.config}"
        values |= {_known(name, where): value for name, value in config.items()}
    for pair in [*options.set, *(f"{name}={value}" for name, value in short_options(options))]:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set: got {pair!r}, want key=value, such as --set layer=16")
        try:
            values[_known(name, "--set")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"--set: {name}: {text!r} is not a valid YAML value: {error}"
            ) from error
    with restored():
        sys.path += [] if options.followed is None else [options.followed]
        settings = {name: _value(name, value) for name, value in values.items()}
    _rehearse(settings)
    return settings


def _config(path: str) -> dict[Any, Any]:
    """The mapping in a YAML file."""
    import yaml

    example = "want a YAML file of settings, such as a line `layer: 16`"
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f"--config: got {path!r} ({error.strerror}), {example}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path!r} is not valid YAML: {error}") from error
    if config is None:
        raise ValueError(f"--config: got {path!r}, which is empty, {example}")
    if not isinstance(config, dict):
        raise ValueError(
            f"--config: {path!r} holds {type(config).__name__}, want a mapping of settings, "
            "such as a line `layer: 16`"
        )
    return config


def _known(name: Any, where: str) -> str:
    if name in parameters():
        return str(name)
    near = difflib.get_close_matches(str(name), parameters(), n=3)
    meant = (
        f"; did you mean {' or '.join(near)}?"
        if near
        else f"; want one of {', '.join(parameters())}"
    )
    raise ValueError(f"{where}: unknown setting {name!r}{meant}")


def _value(name: str, value: Any) -> Any:
    """A YAML value, converted to the type of the parameter: a number that YAML reads as text, a
    dtype, or a callable given as "module:name"."""
    import torch

    if name == "targets" and isinstance(value, list):
        return [
            [*p[:1], *(_value("anchor", a) for a in p[1:])] if isinstance(p, list) else p
            for p in value
        ]
    wanted = str(parameters()[name].annotation)
    if not isinstance(value, str):
        return value
    if "Callable" in wanted and ":" in value:
        return _import(name, value)
    if "dtype" in wanted and isinstance(
        dtype := getattr(torch, value.removeprefix("torch."), None), torch.dtype
    ):
        return dtype
    if "float" in wanted:  # YAML 1.1 takes 1e-3 for text
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _import(name: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{name}: cannot import {path!r}: {error}; want module:name of a module in this folder "
            "or on PYTHONPATH"
        ) from error
    return value


def _rehearse(settings: dict[str, Any]) -> None:
    """Call `apply_pre` on a stand-in without data, so that wrong arguments raise before any
    work."""
    from torch import nn

    from .attach import apply_pre

    layer = settings.get("layer")
    numbers = layer if isinstance(layer, list) else [] if layer is None else [layer]
    targets = settings.get("targets")
    numbers = numbers + [p[0] for p in targets or () if isinstance(p, list) and p]
    for number in numbers:
        # The errors of `apply_pre` would have the depth of the stand-in.
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(
                f"layer: got {number!r}, want an int of at least 1, the first decoder layer, or a "
                "list of them, such as [8,16]"
            )
    depth = min(max([2, *numbers]), 10_000)
    model: Any = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(8, 8, device="meta")] * depth)
    model.multi_modal_projector = nn.Linear(8, 8, device="meta")
    config = {
        "model_type": "llava",
        "image_token_id": 1,
        "hidden_size": 8,
        "num_hidden_layers": depth,
    }
    model.config = SimpleNamespace(**config)
    apply_pre(model, **{n: v for n, v in settings.items() if n not in OF_THE_MODEL}).remove()
