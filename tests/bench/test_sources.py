"""The digest of what a result depends on changes with the code only."""

import shutil

import pytest

from pre_kernels import sources

SOURCE = '''\
"""A module."""

import math


class Row(Exception):
    """A row."""

    width = 4  # columns


def area(rows, width):
    """Rows times width."""
    if rows < 0:
        raise ValueError(f"rows: got {rows}, want ≥ 0")
    total = 0
    for _ in range(rows):
        total += width
    return {"ünit": "mm", "area": total}
'''
WORDS = {
    "docstring of the module": ('"""A module."""', '"""A file\nof words, ünlike."""'),
    "no docstring": ('    """Rows times width."""\n', ""),
    "docstring of a class": ('"""A row."""', '"""A line."""'),
    "comment": ("  # columns", "  # counted in columns, ünlike before"),
    "comment on a line": ("    total = 0\n", "    # so far\n    total = 0\n"),
    "error": (
        'f"rows: got {rows}, want ≥ 0"',
        '"rows: want at least 0, "\n            f"got {rows}"',
    ),
    "white space": ("rows, width)", "rows,\n    width)"),
    "empty lines": ("    total = 0\n", "\n\n    total = 0\n"),
}
CODE = {
    "sign": ("total += width", "total -= width"),
    "number": ("width = 4", "width = 5"),
    "name": ("return {", "yield {"),
    "text": ('"mm"', '"cm"'),
    "depth": ("    return {", "        return {"),
    "kind of an error": ("raise ValueError", "raise KeyError"),
    "condition": ("rows < 0", "rows <= 0"),
    "a line less": ("    total = 0\n", ""),
}


def changed(edit):
    old, new = edit
    assert SOURCE.count(old) == 1
    return SOURCE.replace(old, new)


@pytest.mark.parametrize("edit", WORDS.values(), ids=WORDS)
def test_words_do_not_count(edit):
    assert sources.code(changed(edit)) == sources.code(SOURCE)


@pytest.mark.parametrize("edit", CODE.values(), ids=CODE)
def test_code_counts(edit):
    assert sources.code(changed(edit)) != sources.code(SOURCE)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Return a copy of the package. The folder of integrations replaces its link, as in a wheel."""
    folder = tmp_path_factory.mktemp("copy") / "pre_kernels"
    shutil.copytree(sources.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def digests(package, monkeypatch):
    monkeypatch.setattr(sources, "PACKAGE", package)
    return {kind: sources.digest.__wrapped__(kind) for kind in sources.MEASURED}


# Each file, and the kinds of results that depend on it.
CORE_KINDS = set(sources.MEASURED) - {"diagnostics"}
FILES = {
    "loss.py": CORE_KINDS,
    "fused/kernels/row_loss.py": CORE_KINDS,
    "integrations/attach.py": {"training", "demo", "evidence", "real"},
    "demo/train.py": {"demo", "evidence"},
    "demo/threads.py": {"demo", "evidence"},
    "demo/results.py": set(),
    "demo/progress.py": set(),
    "demo/real/scenes.py": {"real"},
    "demo/real/results.py": set(),
    "diagnostics/measures/contrast.py": {"diagnostics", "demo", "evidence", "real"},
    "diagnostics/report/page.py": set(),
    "cli/commands.py": set(),
}


@pytest.mark.parametrize("file", FILES)
def test_each_kind_depends_on_its_files(file, package, monkeypatch):
    before = digests(package, monkeypatch)
    path = package / file
    kept = path.read_text(encoding="utf-8")
    try:
        path.write_text(f"# a comment\n{kept}", encoding="utf-8")
        assert digests(package, monkeypatch) == before
        path.write_text(f"{kept}\nEDITED = True\n", encoding="utf-8")
        after = digests(package, monkeypatch)
    finally:
        path.write_text(kept, encoding="utf-8")
    assert {kind for kind in before if after[kind] != before[kind]} == FILES[file]


def test_a_copy_has_the_same_digests(package, monkeypatch):
    here = {kind: sources.digest(kind) for kind in sources.MEASURED}
    assert digests(package, monkeypatch) == here


def test_every_part_is_there():
    for parts in sources.MEASURED.values():
        for part in parts:
            assert (sources.PACKAGE / part).exists(), part
