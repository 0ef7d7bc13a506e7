"""What README, CONTRIBUTING, changelog and help texts name exists, and what exists is named."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest

import pre_kernels
from pre_kernels import cli, fused_pre_loss
from pre_kernels.integrations import apply_pre, launch
from pre_kernels.integrations.notices import WARNINGS
from verify import ROOT

# docs/stacks.md names files of others
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "recipes/README.md",
    "docs/troubleshooting.md",
    "docs/numerics.md",
    "bench/README.md",
)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
# file endings of what a page calls a file, where it is no name of a class or an attribute
FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|json|jsonl|png|yaml)|(?:[\w.-]+/)+")
# Files that a command writes, beside what it is about, or that are on the user's side.
WRITTEN = {
    "report.html", "check.json", "layers.csv", "diagnosis.json", "train.py", "pre.yaml",
    "trainer_state.json", "pre_head.json", "instances_val2017.json",
    "photos/", "imagenet/", "val2017/", "held-out/", "out/", "masks/",
}  # fmt: skip


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """The lines of code blocks without a language: what one types, without comments."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    typed = [
        line
        for language, block in found
        if not language
        for line in block.splitlines()
        if line.strip()
    ]
    return [re.split(" +#", line)[0].strip() for line in typed]


def code(text: str) -> list[str]:
    """Inline code, and the lines of blocks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [*re.findall(r"`([^`\n]+)`", prose), *blocks(text)]


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_make_help_lists_every_target() -> None:
    # under `make test` a make inside says which folder it enters
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE.replace("\\\n", ""), re.MULTILINE)[1].split()
    assert listed == TARGETS
    assert sorted(phony) == sorted(TARGETS)


def test_help_lists_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    for name in commands():
        assert re.search(rf"^ +{name} ", printed, re.MULTILINE), name
        assert f"  pre-kernels {name} " in printed, f"no example of {name}"
        assert name in cli.__doc__
    assert len(
        set(re.findall(r"^  pre-kernels (\w+)", printed, re.MULTILINE)) - {"--version"}
    ) == len(commands())


@pytest.mark.parametrize("command", sorted(commands()))
def test_examples_of_help_texts_parse(command: str) -> None:
    text = commands()[command].format_help()
    for line in re.findall(r"^  pre-kernels (.*)$", text, re.MULTILINE):
        cli.parser().parse_args(shlex.split(re.split(r"  +", line)[0]))


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    named = {m for text in code(read(page)) for m in re.findall(r"(?:^|\n|; )make ([a-z-]+)", text)}
    assert named <= set(TARGETS)
    assert page != "README.md" or {"demo", "test", "help", "gpu"} <= named


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    text = read(page)
    folder = (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert not [link for link in links if not (folder / link.partition("#")[0]).exists()]
    named = [
        word.strip("()")
        for line in code(text)
        for word in line.split()
        if FILE.fullmatch(word.strip("()"))
    ]
    there = {
        path.name for path in ROOT.rglob("*") if not {".venv", ".deps", "build"} & set(path.parts)
    }
    missing = [
        name
        for name in named
        if name not in WRITTEN and not name.startswith(("out/", "demo-out/", "without", "with"))
        if not (ROOT / name).exists()
        if not ("/" not in name and name in there)
        if not any(ROOT.glob(f"*/{name}"))
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    """Of the command line and of the launcher; `pre-kernels demo | env` and a command by itself
    only name commands."""
    for line in code(read(page)):
        words = (
            shlex.split(line) if re.match(r"(\S+/)?pre-kernels |torchrun |python -m ", line) else []
        )
        if "pre_kernels.integrations.launch" in words and "--" in words:
            words = words[words.index("pre_kernels.integrations.launch") + 1 : words.index("--")]
            launch._parser().parse_args(words)
        elif len(words) > 1 and words[0].endswith("pre-kernels"):
            arguments = [word for word in words[1:] if word != "|"]
            if (
                not {"--help", "--version"} & set(arguments)
                and not set(arguments) <= commands().keys()
            ):
                cli.parser().parse_args(arguments)
            assert arguments[0] in {*commands(), "--help", "--version"}


@pytest.mark.parametrize("page", PAGES)
def test_options_and_extras_exist(page: str) -> None:
    text = read(page)
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("tests", "bench", "verify")
        for path in (ROOT / folder).rglob("*.py")
    )
    known = {
        *options(cli.parser()),
        *options(launch._parser()),
        *re.findall(r'"(--[a-z-]+)"', sources),
    }
    named = {m for line in code(text) for m in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    others = {"--nproc-per-node"}  # torchrun's
    assert not named - known - others
    asked = {name for extras in re.findall(r"\.\[([a-z,-]+)\]", text) for name in extras.split(",")}
    assert asked <= set(metadata.metadata("pre-kernels").get_all("Provides-Extra"))


def table(after: str) -> set[str]:
    """The names in the first column of the README's table whose heading starts like this."""
    rows = read("README.md").split(after, 1)[1].split("\n\n")[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


@pytest.mark.parametrize(
    ("heading", "function", "explained"),
    [
        # arguments that a sentence or an example explains
        ("| option of `apply_pre` |", apply_pre, {"model", "anchor_dim", "impl"}),
        ("| option | |", fused_pre_loss, {"hidden", "anchor", "w1", "b1", "w2", "b2"}),
    ],
)
def test_tables_of_options_are_complete(heading: str, function: Any, explained: set[str]) -> None:
    assert table(heading) | explained == set(inspect.signature(function).parameters)


def test_every_warning_has_its_cause_and_remedy() -> None:
    """Under its name in the table of warnings, with the words that one sees."""
    sections = re.split(r"^### ", read("docs/troubleshooting.md"), flags=re.MULTILINE)[1:]
    found = {section.partition("\n")[0]: section.split("\n\n") for section in sections}
    assert found.keys() == WARNINGS.keys()
    for name, (_, quoted, *explained) in found.items():
        said = re.sub(r"^> PRe: (WARNING: )?", "", quoted)
        parts = [re.escape(part.strip()) for part in said.replace("\n> ", " ").split("…")]
        given = re.sub(r"{[^}]*}", "2", WARNINGS[name].replace("{labels}", "labels"))
        assert re.match(".*".join(parts), given), name
        assert explained, name


def test_changelog() -> None:
    text = read("CHANGELOG.md")
    versions = re.findall(r"^## \[?([^\]\s]+)\]?(?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert versions[1][0] == pre_kernels.__version__
    assert all(date for _, date in versions[1:])
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_version_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'version = { attr = "pre_kernels.__version__" }' in read("pyproject.toml")
    assert not re.search(r'^version = "', read("pyproject.toml"), re.MULTILINE)
    assert not re.search(rf"\b{re.escape(pre_kernels.__version__)}\b", read("README.md"))
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.split() == ["pre-kernels", pre_kernels.__version__]


def test_help_where_the_terminal_has_no_unicode() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = ["-c", "from pre_kernels.cli import main; main(['demo', '--help'])"]
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the weight of L_PRe" in done.stdout
