"""Names of a package that are imported on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a `__getattr__` for `package`. It also finds modules of the package by their name.

    Args:
        package: its name.
        names: for each module of the package the names in it that are names of the package.
    """
    modules = {name: module for module, some in names.items() for name in some}

    def get(name: str) -> Any:
        if name in modules:
            value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        else:
            value = _module(package, name)
        # From here on the name is found without this function.
        setattr(sys.modules[package], name, value)
        return value

    return get


def _module(package: str, name: str) -> Any:
    missing = AttributeError(f"module {package!r} has no attribute {name!r}")
    # Python and tools that look into packages ask for names such as __wrapped__.
    if name.startswith("_"):
        raise missing
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"{package}.{name}":
            raise missing from None
        raise
