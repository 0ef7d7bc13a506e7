"""Every version that is claimed has a job that runs with it. conftest.py stops a job that runs with
another version."""

from __future__ import annotations

import re
import subprocess

import pytest
from packaging.version import Version

from pre_kernels.fused.ops import OLDEST_TORCH
from verify import ROOT, versions

PAGES = {
    "README.md": (ROOT / "README.md").read_text(encoding="utf-8"),
    "docs/models.md": versions.PAGE.read_text(encoding="utf-8"),
}
NAMES = {"torch", "triton", "transformers"}
# What CI gives to `make test`.
ASKED = "--versions $(.venv/bin/python -m verify.versions)"


def test_the_table_begins_with_the_oldest_that_are_claimed() -> None:
    table = versions.table()
    oldest = versions.oldest()
    assert tuple(table) == versions.ROWS
    assert all(row.keys() == NAMES for row in table.values())
    differ = {name for name in NAMES if table["oldest"][name] != oldest[name]}
    assert not differ, (
        f"pyproject.toml claims another {differ} than the oldest that docs/models.md says is tested"
    )
    for row in table.values():
        assert all(version in versions.claims()[name] for name, version in row.items()), (
            f"not claimed: {row}"
        )


def test_the_library_refuses_an_older_torch() -> None:
    """A kernel from the Hub has no installer that would."""
    assert versions.oldest()["torch"].release[:2] == OLDEST_TORCH


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_is_claimed(page: str) -> None:
    for name in NAMES:
        said = {Version(found) for found in re.findall(rf"{name} ≥ (\d[\d.]*\d)", PAGES[page])}
        assert said == {versions.oldest()[name]}, (
            f"{page} and pyproject.toml differ in the oldest {name}"
        )


@pytest.mark.parametrize("row", versions.ROWS)
def test_a_job_runs_with_each_row(row: str) -> None:
    """It is in the target of make that the table names, or in CI."""
    line = re.search(rf"^\| {row} \|.*$", PAGES["docs/models.md"], re.MULTILINE)[0]
    target = re.search(r"`make ([a-z-]+)`", line)[1]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for version in ((3, 10), (3, 11)):
        ci += f"\nmake test --versions {versions.ci_row(version)}\n" if ASKED in ci else ""
    full = subprocess.run(
        ["make", "-n", "test-full"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    does = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = re.findall(rf"make {target}\b.*", ci) + does.splitlines()
    assert any(re.search(rf"--versions {row}\b", command) for command in commands), (
        f"nothing runs with {row}"
    )
    if "in CI" in line:
        assert f"make {target}" in ci
    else:
        assert set(does.splitlines()) <= set(full.splitlines())


def test_the_oldest_are_what_is_asked_of_the_installer() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^PINS_oldest := --resolution lowest-direct ", makefile, re.MULTILINE)


def test_a_difference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {**versions.oldest(), "torch": Version("2.13.0"), "einops": None}
    monkeypatch.setattr(versions, "installed", there.get)
    oldest = versions.oldest()
    assert versions.differences("oldest") == [
        f"torch 2.13.0, want {oldest['torch']}",
        f"einops None, want {oldest['einops']}",
    ]
    assert any(
        line.startswith("triton") and "or newer" in line for line in versions.differences("newest")
    )
