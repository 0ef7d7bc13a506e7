"""Errors for the wrong kind of first argument. They name what was passed, and the line to write
instead."""

from __future__ import annotations

import os
from typing import Any

from torch import nn


def check_module(model: Any) -> None:
    """Raise a TypeError if `model` is not an nn.Module, or is an nn.DataParallel."""
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "model: got nn.DataParallel, whose replicas share hooks; want the module inside, "
            "apply_pre(model.module), under DDP or FSDP"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {_named(model)}, want a loaded model{_attach_line(model)}")


def check_trainer_class(target: Any, base: type) -> None:
    """Raise a TypeError if `target` is not `transformers.Trainer`, which is `base`, or a subclass
    of it."""
    if isinstance(target, type) and issubclass(target, base):
        return
    if isinstance(target, base):
        line = f"patch_trainer({type(target).__name__})"
    else:
        before = "apply_pre(model) and then " if isinstance(target, nn.Module) else ""
        line = f"{before}patch_trainer(), which patches all Trainers"
    raise TypeError(
        f"trainer_class: got {_named(target)}, want transformers.Trainer or a subclass; write "
        f"{line}"
    )


def _attach_line(model: Any) -> str:
    """The line to write in place of `apply_pre(model)`; empty if there is no guess."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        load = model.__name__
        path = "..."
    elif isinstance(model, (str, os.PathLike)):
        load = "AutoModelForImageTextToText"
        path = repr(os.fspath(model))
    elif isinstance(getattr(model, "model", None), nn.Module):
        return f"; write apply_pre(x.model), where x is that {type(model).__name__}"
    else:
        return ""
    return f"; write apply_pre({load}.from_pretrained({path}))"


def _named(value: Any) -> str:
    """A value in the words of an error: a class, a text, None, or something of a class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (str, os.PathLike, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"
