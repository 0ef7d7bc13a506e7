"""What a row of the tables of mistakes is, and how it is tried."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pre_kernels import cli
from pre_kernels.integrations import launch

GAP = "…"  # any text
COMMAND = "$ "
# The commands of pre-kernels that work for seconds or more.
LONG = ("demo", "diagnose", "check", "tune")
# Words of mended mistakes that a user chooses: names of files and variables.
CHOSEN = {"anchors", "classes", "folder", "its", "photos", "plain", "train", "with"}


@dataclass(frozen=True)
class Mistake:
    """A mistake of a user, and what the library says about it.

    Attributes:
        about: the mistake in words.
        wrong: the mistake as Python, or as a command line behind "$ ".
        says: the whole message, in which … stands for any text.
        right: what the message leads to, as Python or a command line. It works. Of
            its words that `wrong` lacks and the user does not choose the message has at least one.
    """

    about: str
    wrong: str
    says: str
    right: str

    def __str__(self) -> str:
        return self.about


def heard(
    code: str, makers: Mapping[str, Callable[[], Any]], parse_only: bool = False
) -> list[str]:
    """Run Python or a command line, and return the messages of the library.

    Args:
        code: Python, or a command line behind "$ ".
        makers: a function for each name that Python takes as given. It makes the value.
        parse_only: as of `run_command`.
    """
    if code.startswith(COMMAND):
        return run_command(shlex.split(code.removeprefix(COMMAND)), parse_only)
    tree = ast.parse(code)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    values = {name: make() for name, make in makers.items() if name in used}
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exec(compile(tree, "<mistake>", "exec"), values)
        except Exception as error:
            messages.append(str(error))
    about_pre = [str(w.message) for w in caught if str(w.message).startswith("PRe: ")]
    return about_pre + messages


def run_command(words: list[str], parse_only: bool = False) -> list[str]:
    """Run a command line in this process, and return the message with which it ends, without the
    name of the program and its usage. With `parse_only` a command of `pre-kernels` that works for
    seconds only reads its arguments, and a benchmark does not run."""
    said = io.StringIO()
    status: Any = 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            if words[0] == "pre-kernels" and parse_only and words[1] in LONG:
                cli.parser().parse_args(words[1:])
            elif words[2:] and words[2].startswith("bench."):
                if not parse_only:
                    status = importlib.import_module(words[2]).main(words[3:])
            elif words[0] == "pre-kernels":
                status = cli.main(words[1:])
            elif words[:3] == ["python", "-m", "pre_kernels.integrations.launch"]:
                launch.main(words[3:])
            else:
                raise AssertionError(f"no such program: {words[0]}")
        except SystemExit as left:
            status = left.code
    _, found, message = said.getvalue().partition("error: ")
    assert bool(found) == bool(status), said.getvalue()
    return [message.strip()] if found else []


def matches(pattern: str, message: str) -> bool:
    """Whether the message is the pattern; a gap is any text, line breaks are spaces."""
    parts = (re.escape(part) for part in " ".join(pattern.split()).split(GAP))
    return re.fullmatch(".*".join(parts), " ".join(message.split())) is not None


def own_words(code: str) -> set[str]:
    """The words in a text that are not a user's choice."""
    return {word for word in words(code) - CHOSEN if not word.isdecimal()}


def words(code: str) -> set[str]:
    """The words and numbers in a text, those that a name is made of too."""
    return set(re.findall(r"[A-Za-z]+|\d+", code))
