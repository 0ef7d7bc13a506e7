"""On PYTHONPATH, this makes a checkout that is not installed importable like the installed package:
Python runs it at start, in child processes too. It adds one finder, asked last, that knows where
`pre_kernels.integrations` lies."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class IntegrationsFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != "pre_kernels.integrations":
            return None
        folder = ROOT / "integrations"
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def run_shadowed() -> None:
    """Run the sitecustomize that this one hides, if the machine has one."""
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.append(IntegrationsFinder())
run_shadowed()
