"""The parser of a command: help texts that fit the terminal, and errors that say what was meant."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from pre_kernels import _moved

# The help of argparse leaves two columns free too.
MARGIN = 2
# The second column of a table begins here at the latest.
COLUMN = 34


class Table(NamedTuple):
    """Rows of two cells under a title, as part of an epilog. Commands in the first column are
    wrapped so that they can still be copied."""

    title: str
    rows: list[tuple[str, str]]


def table(text: str) -> Table:
    """Return the table of a text. Below the title, the first cell of a row is a line, and the
    indented lines after it are the second cell."""
    title, *rows = [row.split("\n") for row in re.split(r"\n(?! )", text.strip())]
    return Table(title[0], [(left, " ".join(map(str.strip, right))) for left, *right in rows])


class OldName(argparse.Action):
    """An old name of an option: the same, with a warning. Help does not show it.

    Args:
        new: the name of the option.
        prog: the command.
    """

    def __init__(self, option_strings: Sequence[str], *, new: str, prog: str, **more: Any) -> None:
        super().__init__(option_strings, **more)
        self.text = _moved.renamed(f"{prog} {option_strings[0]}", f"{prog} {new}")
        _moved.NAMES[f"{prog} {option_strings[0]}"] = f"{prog} {new}"

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        # Python hides a DeprecationWarning from those who type a command.
        print(self.text, file=sys.stderr)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser whose description and epilog are wrapped to the terminal. It reports unknown
    options itself, where argparse leaves those of a command to the parser of all commands, whose
    usage does not help.

    Args:
        epilog: paragraphs and tables.
    """

    def __init__(
        self, *, description: str = "", epilog: Sequence[str | Table] = (), **more: Any
    ) -> None:
        width = shutil.get_terminal_size().columns - MARGIN
        super().__init__(
            description=textwrap.fill(description, width),
            epilog="\n\n".join(laid_out(part, width) for part in epilog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )

    def option(self, usage: str, help: str, *, old: str | None = None, **more: Any) -> None:
        """Add an option or argument that is written as in the usage: "--seeds N" takes a value,
        "--quick" without `choices` is a flag, and "IMAGES" is the argument `images`. `old` is an
        old name of an option with a value."""
        *names, last = usage.split()
        if last.startswith("-"):
            names.append(last)
            more = more if "choices" in more else {"action": "store_true"}
        else:
            more["metavar"] = last
        added = self.add_argument(*names or [last.lower()], help=help, **more)
        if old is not None:
            self.add_argument(
                old,
                action=OldName,
                new=names[0],
                prog=self.prog,
                dest=added.dest,
                type=added.type or str,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            self.error(
                f"got {' '.join(unknown)}, want only what {self.prog} --help lists"
                + meant(unknown[0], known)
            )
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with 2."""
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            names = re.findall(r"[\w-]+", choice[2])
            said = f"got {choice[1]!r}, want one of {', '.join(names)}{meant(choice[1], names)}"
            message = message[: choice.start()] + said
        message = re.sub(r"invalid int value: (.*)", r"got \1, want a whole number", message)
        super().error(message)


def meant(word: str, names: Sequence[str]) -> str:
    """Return the end of a message that names the closest of the names, or nothing."""
    word = word.partition("=")[0]
    # "quick" is close to --quick.
    found = difflib.get_close_matches(word, names) or difflib.get_close_matches(f"--{word}", names)
    return f"; did you mean {found[0]}?" if found else ""


def laid_out(part: str | Table, width: int) -> str:
    """Return a paragraph or a table in lines of at most `width` columns."""
    if isinstance(part, str):
        return textwrap.fill(part, width, break_on_hyphens=False)
    column = min(COLUMN, 4 + max(len(left) for left, _ in part.rows))
    lines = [part.title]
    for left, right in part.rows:
        # The space for the backslash at the end of a line.
        first = textwrap.wrap(
            left, width - 4, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        head = " \\\n".join(f"  {line}" for line in first)
        text = textwrap.wrap(right, max(width - column, 20), break_on_hyphens=False)
        if text and len(first) == 1 and len(left) + 4 <= column:
            head = f"{head:<{column}}{text.pop(0)}"
        lines += [head, *(" " * column + line for line in text)]
    return "\n".join(lines)
