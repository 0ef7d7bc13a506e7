"""Keep names importable from their old paths for one version, each with a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(
    module: str, new: Mapping[str, str], others: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """Return a `__getattr__` for `module` that finds each name of `new` in the module it has moved
    to, and other names by `others`."""

    def get(name: str) -> Any:
        if name not in new:
            if others is not None:
                return others(name)
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} has moved to {new[name]}.{name}; the old path goes in 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(new[name]), name)

    return get
