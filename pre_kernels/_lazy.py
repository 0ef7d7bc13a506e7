"""Names of a package that are imported on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a `__getattr__` for `package`.

    Args:
        package: its name.
        names: for each module of the package the names in it. Its own name stands for itself.
    """
    modules = {name: module for module, some in names.items() for name in some}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{modules[name]}")
        value = module if name == modules[name] else getattr(module, name)
        # From here on the name is found without this function.
        setattr(sys.modules[package], name, value)
        return value

    return get
