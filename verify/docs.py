"""The API reference by pdoc: `python -m verify.docs FOLDER MODULE …`.

pdoc takes what `__all__` names from a module's namespace. Names that a module imports when they are
asked for, as `pre_kernels.diagnostics.LayerCallback`, have to be put there first.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def resolve(names: Sequence[str]) -> None:
    """Import each module with everything that its `__all__` names."""
    for name in names:
        module = importlib.import_module(name)
        for member in getattr(module, "__all__", ()):
            setattr(module, member, getattr(module, member))


def main(folder: str, names: Sequence[str]) -> None:
    import pdoc
    from pdoc import render

    resolve(names)
    render.configure(docformat="google", include_undocumented=False)
    pdoc.pdoc(*names, output_directory=Path(folder))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
