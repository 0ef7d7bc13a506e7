"""Keep old names working until a version and a date, each with a warning that says both.

docs/api/index.md lists the old names, and a test compares the list with `NAMES`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

# The old names go in this version, and not before this date.
VERSION = "0.3.0"
DATE = "2027-06-01"
# The new name of each old one, of the modules and parsers that exist so far.
NAMES: dict[str, str] = {}


def renamed(old: str, new: str) -> str:
    """Return the text of the warning."""
    return f"{old} is now {new}; the old name goes in {VERSION}, not before {DATE}"


def moved(
    module: str, new: Mapping[str, str], others: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """Return a `__getattr__` for `module` that finds each name of `new` in the module it has moved
    to, and other names by `others`."""
    NAMES.update({f"{module}.{name}": f"{place}.{name}" for name, place in new.items()})

    def get(name: str) -> Any:
        if name not in new:
            if others is not None:
                return others(name)
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        old = f"{module}.{name}"
        warnings.warn(renamed(old, NAMES[old]), DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(new[name]), name)

    return get
