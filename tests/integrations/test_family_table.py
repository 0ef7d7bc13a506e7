"""The table of supported families is one: that of docs/models.md, the command's, and what the tests
build."""

from __future__ import annotations

import re

import pytest

from pre_kernels import cli
from pre_kernels.cli import commands
from pre_kernels.integrations import families, family_table
from verify import ROOT


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    found = page.split("<!-- models:begin -->\n")[1].split("\n<!-- models:end -->")[0]
    assert found == family_table.markdown(), "run: pre-kernels env --models --markdown"


def unnamed(text: str) -> list[str]:
    """The families that a text does not name: "Gemma 3" in "Gemma 3n" or "LLaVA" in "LLaVA-NeXT"
    names another family."""
    words = " ".join(text.split())
    return [
        row.name
        for row in families.FAMILIES.values()
        if not re.search(rf"(?<![\w-]){re.escape(row.name)}(?![\w-]|\.\d)", words)
    ]


def test_readme_names_every_family() -> None:
    assert not unnamed((ROOT / "README.md").read_text(encoding="utf-8"))


def test_a_family_that_is_not_named_is_found() -> None:
    names = [row.name for row in families.FAMILIES.values()]
    gemma = ", ".join(name for name in names if name != "Gemma 3")
    assert "Gemma 3n" in gemma
    assert unnamed(gemma) == ["Gemma 3"]
    assert not unnamed(",\n".join(names))


def test_every_row_has_a_name_and_stands_in_the_table_once() -> None:
    assert all(row.name for row in families.FAMILIES.values())
    *listed, original, other = family_table.supported()
    assert sorted(name for line in listed for name in line.types) == sorted(families.FAMILIES)
    assert (original.row, original.cells()[2:4]) == (
        families.ORIGINAL,
        ("", "their order in images"),
    )
    assert other.row is families.GENERIC


def test_every_rule_for_images_has_words() -> None:
    rules = {row.images.__name__ for row in families.FAMILIES.values()}
    assert rules <= family_table.RULES.keys()


def test_model_types_of_one_name_share_a_line() -> None:
    line = next(line for line in family_table.supported() if line.name == "Qwen3.5")
    assert line.types == ("qwen3_5", "qwen3_5_moe")
    assert line.cells() == ("Qwen3.5", "qwen3_5, qwen3_5_moe", "≥ 5.2", "grid_thw", "yes", "yes")


@pytest.mark.parametrize(
    ("installed", "llava", "qwen"),
    [
        ("4.57.6", "yes", "no"),
        ("5.1.0", "yes", "no"),
        ("5.2.0", "yes", "yes"),
        ("5.24.0.dev0", "yes", "yes"),
    ],
)
def test_text_says_what_is_installed(installed: str, llava: str, qwen: str) -> None:
    lines = family_table.text(installed).splitlines()
    here = {line.split()[0]: line[lines[0].index("here") :] for line in lines}
    assert (here["LLaVA"], here["Qwen3.5"]) == (llava, qwen)
    assert here["any"] == ""


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["env", "--models", "--markdown"]) == 0
    assert capsys.readouterr().out == family_table.markdown() + "\n"
    monkeypatch.setattr(commands, "installed", lambda package: None)
    assert cli.main(["env", "--models"]) == 0
    assert capsys.readouterr().out == family_table.text(None) + "\n"
    assert cli.main(["env", "--markdown"]) == 2
    assert "--markdown needs --models" in capsys.readouterr().err
