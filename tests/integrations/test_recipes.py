"""The recipes: their settings are ones the launcher takes, and their commands are ones it can read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pre_kernels.integrations import launch

ROOT = Path(__file__).parents[2] / "recipes"
COMMAND = re.compile(r"pre_kernels\.integrations\.launch\s(.*?)\s--\s", re.DOTALL)


def commands(readme: Path) -> list[str]:
    blocks = "".join(line for line in readme.read_text().splitlines(keepends=True) if line.startswith("    "))
    return COMMAND.findall(blocks.replace("\\\n", " "))


@pytest.mark.parametrize("readme", sorted(ROOT.rglob("README.md")), ids=lambda path: path.parent.name)
def test_commands(readme: Path) -> None:
    found = commands(readme)
    assert found
    for options in found:
        given = launch._parser().parse_args(shlex.split(options))
        if given.config is not None and readme.parent != ROOT:
            given.config = str(readme.parent / Path(given.config).name)
            settings = launch._settings(given)
            assert settings["weight"] == 0.5


def test_every_folder_is_listed() -> None:
    listed = re.findall(r"^\| \[(\S+)\]\((\S+)\)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted((folder.name, folder.name) for folder in ROOT.iterdir() if folder.is_dir())
