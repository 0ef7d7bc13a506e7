"""What the pages and the help texts name exists, and what exists is named.

A new page is found by itself.
"""

from __future__ import annotations

import argparse
import functools
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
from verify.docs import dead, pages

PAGES = pages(ROOT)
# These name the files and options of other projects; test_recipes.py reads their commands.
OF_OTHERS = {page for page in PAGES if page.startswith("recipes/")} - {"recipes/README.md"}
OF_OTHERS.add("docs/stacks.md")
OURS = [page for page in PAGES if page not in OF_OTHERS]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
# A word with such an ending is the name of a file, not of a class or an attribute.
FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|json|jsonl|png|yaml)|(?:[\w.-]+/)+")
# Files that a command writes, or that the user has.
WRITTEN = {
    "report.html", "demo.md", "check.json", "layers.csv", "diagnosis.json", "train.py", "pre.yaml",
    "trainer_state.json", "pre_head.json", "instances_val2017.json", "tiles.json",
    "trace.png", "loss.png",
    "photos/", "imagenet/", "val2017/", "held-out/", "out/", "masks/",
}  # fmt: skip


WEIGHTS = ("w1", "b1", "w2", "b2")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """The lines that one types: code blocks in bash or without a language, without comments."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    typed = [
        line
        for language, block in found
        if language in ("", "bash")
        for line in block.replace("\\\n", " ").splitlines()
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
    text = re.sub(r" \\\n +", " ", commands()[command].format_help())
    for line in re.findall(r"^  pre-kernels (.*)$", text, re.MULTILINE):
        cli.parser().parse_args(shlex.split(re.split(r"  +", line)[0]))


def missing_targets(text: str) -> set[str]:
    named = {m for line in code(text) for m in re.findall(r"(?:^|\n|; )make ([a-z-]+)", line)}
    return named - set(TARGETS)


@functools.cache
def file_names() -> set[str]:
    left_out = {".venv", ".deps", "build", ".git"}
    return {path.name for path in ROOT.rglob("*") if not left_out & set(path.parts)}


def missing_files(text: str) -> list[str]:
    named = [
        word.strip("()")
        for line in code(text)
        for word in line.split()
        if FILE.fullmatch(word.strip("()"))
    ]
    return [
        name
        for name in named
        if name not in WRITTEN
        and not name.startswith(("out/", "demo-out/", "demo-quick-out/", "without", "with"))
        if not (ROOT / name).exists()
        if not ("/" not in name and name in file_names())
        if not any(ROOT.glob(f"*/{name}"))
    ]


def parse(line: str) -> None:
    """A command of the command line or of the launcher; `pre-kernels demo | env` and a command by
    itself only name commands."""
    if not re.match(r"(\S+/)?pre-kernels |torchrun |python -m ", line):
        return
    words = shlex.split(line)
    if "pre_kernels.integrations.launch" in words and "--" in words:
        words = words[words.index("pre_kernels.integrations.launch") + 1 : words.index("--")]
        launch._parser().parse_args([word for word in words if word != "…"])
    elif len(words) > 1 and words[0].endswith("pre-kernels"):
        arguments = [word for word in words[1:] if word != "|"]
        if not {"--help", "--version"} & set(arguments) and not set(arguments) <= commands().keys():
            cli.parser().parse_args(arguments)
        assert arguments[0] in {*commands(), "--help", "--version"}


@functools.cache
def known_options() -> set[str]:
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("tests", "bench", "verify", "examples")
        for path in (ROOT / folder).rglob("*.py")
    )
    # torchrun's, and what stands for any option
    others = {"--nproc-per-node", "--name"}
    ours = {*options(cli.parser()), *options(launch._parser())}
    return {*ours, *others, *re.findall(r'"(--[a-z-]+)"', sources)}


def missing_options(text: str) -> set[str]:
    named = {m for line in code(text) for m in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    return named - known_options()


def missing_extras(text: str) -> set[str]:
    lists = re.findall(r"(?:\.|pre-kernels)\[([a-z,-]+)\]", text)
    extras = set(metadata.metadata("pre-kernels").get_all("Provides-Extra"))
    return {name for names in lists for name in names.split(",")} - extras


def tags(text: str) -> list[str]:
    """The HTML tags outside code, which a page does without; its tables stand between comments."""
    prose = re.sub(r"^ *```.*?^ *```$|^    .*?$|`[^`]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"</?[a-zA-Z][^>\n]*>", prose)


def test_every_kind_of_page_is_found() -> None:
    some = {"README.md", "CONTRIBUTING.md", "docs/models.md", "docs/api/index.md"}
    assert some | {"recipes/trl/README.md", "docs/generated/fuzz.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    assert not missing_targets(read(page))


@pytest.mark.parametrize("page", [*PAGES, "bench/NOTES.md"])
def test_links_lead_to_files_and_headings(page: str) -> None:
    assert not dead(ROOT, page, read(page))


@pytest.mark.parametrize("page", OURS)
def test_files_exist(page: str) -> None:
    assert not missing_files(read(page))


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    for line in code(read(page)):
        parse(line)


@pytest.mark.parametrize("page", OURS)
def test_options_exist(page: str) -> None:
    assert not missing_options(read(page))


@pytest.mark.parametrize("page", PAGES)
def test_extras_exist(page: str) -> None:
    assert not missing_extras(read(page))


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_no_html_but_comments(page: str) -> None:
    assert not tags(read(page))


MADE_UP = """# A page

See [there](nowhere.md), [the start](#a-page), [a `heading`](#no-such-heading),
[the models](docs/models.md#no-such-family) and ![a picture](docs/pictures/no_such.png), but not
`[this](code.md)`. Its file is `pre_kernels/no_such.py`.

<!-- a comment --> <details>`<code>`</details>

```bash
make nonsense
pip install -e '.[nonsense]'
pre-kernels check --nonsense 3
```

```text
make nothing of [this](output.md)
```
"""


def test_what_a_page_says_wrongly_is_found() -> None:
    assert dead(ROOT, "made-up.md", MADE_UP) == [
        "made-up.md: nowhere.md: got no such file",
        "made-up.md: #no-such-heading: got no such heading",
        "made-up.md: docs/models.md#no-such-family: got no such heading",
        "made-up.md: docs/pictures/no_such.png: got no such file",
    ]
    assert tags(MADE_UP) == ["<details>", "</details>"]
    assert missing_targets(MADE_UP) == {"nonsense"}
    assert missing_files(MADE_UP) == ["pre_kernels/no_such.py"]
    # as a word without hyphens, because options in quotes in a test are taken to exist
    assert [option.strip("-") for option in missing_options(MADE_UP)] == ["nonsense"]
    assert missing_extras(MADE_UP) == {"nonsense"}
    (command,) = (line for line in code(MADE_UP) if line.startswith("pre-kernels"))
    with pytest.raises(SystemExit):
        parse(command)


def table(page: str, after: str) -> set[str]:
    """The names in the first column of a page's table whose heading starts like this."""
    rows = read(page).split(after, 1)[1].split("\n\n")[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


@pytest.mark.parametrize(
    ("page", "heading", "function", "explained"),
    [
        # arguments that a sentence or an example explains
        (
            "docs/training.md",
            "| option of `apply_pre` |",
            apply_pre,
            {"model", "anchor_dim", "impl"},
        ),
        ("docs/loss.md", "| option | |", fused_pre_loss, {"hidden", "anchor", *WEIGHTS}),
    ],
)
def test_tables_of_options_are_complete(
    page: str, heading: str, function: Any, explained: set[str]
) -> None:
    assert table(page, heading) | explained == set(inspect.signature(function).parameters)


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
    kinds = {kind for kind in kinds if not re.fullmatch(r"Moving from \d+\.\d+\.\d+", kind)}
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
