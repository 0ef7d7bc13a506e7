"""The law of imports, as `pyproject.toml` states it under [tool.importlinter]. Imports inside
functions count, and so do those for type checkers."""

from __future__ import annotations

import grimp
import pytest
from importlinter import cli

from verify import ROOT

PACKAGES = ("pre_kernels", "verify", "bench", "tests")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def test_the_law(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


def test_the_law_sees_the_whole_tree(graph: grimp.ImportGraph) -> None:
    """pre_kernels.integrations is a link, which a walk through folders may skip."""
    files = {path.stem for path in (ROOT / "integrations").glob("*.py")} - {"__init__"}
    seen = graph.find_children("pre_kernels.integrations")
    assert seen == {f"pre_kernels.integrations.{name}" for name in files}


def is_test(module: str) -> bool:
    return module.startswith("tests.") and module.rpartition(".")[2].startswith("test_")


def test_no_test_module_imports_another(graph: grimp.ImportGraph) -> None:
    """Code that two of them need is in a support module next to them, or in verify."""
    found = {
        f"{importer} imports {imported}"
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        if is_test(imported)
    }
    assert not found, "\n".join(sorted(found))
