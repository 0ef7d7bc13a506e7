"""The launcher accepts the settings and commands of the recipes, and each says at its top what was
run."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from pre_kernels.integrations import launch
from verify import ROOT

RECIPES = ROOT / "recipes"
# These have code instead of a command.
IN_CODE = {
    "lightning": {"apply_pre", "PreLightningCallback"},
    "viral": {"apply_pre", "patch_trainer"},
    "pointalign": {"apply_pre", "PreHead"},
    "blindvla": {"apply_pre", "PreHead"},
    "spatial-forcing": {"apply_pre", "PreHead"},
}
COMMAND = re.compile(r"pre_kernels\.integrations\.launch\b(.*?)\s--\s", re.DOTALL)


def blocks(readme: Path) -> list[str]:
    return [
        textwrap.dedent(block)
        for block in re.findall(r"(?:^(?: {4}.*\n|\n))+", readme.read_text(), re.MULTILINE)
    ]


def commands(readme: Path) -> list[str]:
    return COMMAND.findall("".join(blocks(readme)).replace("\\\n", " "))


@pytest.mark.parametrize(
    "readme",
    [path for path in sorted(RECIPES.rglob("README.md")) if path.parent.name not in IN_CODE],
    ids=lambda path: path.parent.name,
)
def test_commands(readme: Path) -> None:
    found = commands(readme)
    assert found
    for options in found:
        given = launch._parser().parse_args(shlex.split(options))
        if given.config is not None:
            given.config = str(readme.parent / given.config)
            assert launch.read_settings(given)["weight"] == 0.5


@pytest.mark.parametrize("readme", sorted(RECIPES.glob("*/README.md")), ids=lambda p: p.parent.name)
def test_the_first_line_says_what_was_run(readme: Path) -> None:
    """Its versions and numbers are those of the text below."""
    title, empty, line, after, *text = readme.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert line.startswith("Run: ")
    assert line.endswith(".")
    assert empty == after == ""
    said = re.findall(r"[\w.-]*\d[\w.-]*\w|\d+", line)
    assert said or readme.parent.name == "paper"
    assert not [word for word in said if not re.search(rf"\b{re.escape(word)}\b", "\n".join(text))]


def test_every_file_of_settings_is_named_by_its_recipe() -> None:
    """A recipe has a file of settings only where it explains them."""
    files = sorted(RECIPES.rglob("*.yaml"))
    assert files
    for file in files:
        assert f"`{file.name}`" in (file.parent / "README.md").read_text(), file


@pytest.mark.parametrize("name", sorted(IN_CODE))
def test_code(name: str) -> None:
    readme = RECIPES / name / "README.md"
    fenced = re.findall(r"^```python\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)
    code = fenced or [next(block for block in blocks(readme) if block.strip())]
    called = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse("".join(code)))
        if isinstance(node, ast.Call)
    }
    assert IN_CODE[name] <= called


def test_every_folder_is_listed() -> None:
    listed = re.findall(
        r"^\| \[(\S+)\]\((\S+)\)", (RECIPES / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(
        (folder.name, folder.name) for folder in RECIPES.iterdir() if folder.is_dir()
    )
