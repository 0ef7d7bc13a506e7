"""What is public, as a text of one line for each name, parameter and option.

`python -m verify.public` prints it, `--write` writes it to tests/data/public.txt. A test compares
the two, so a change of what is public is seen in the diff of that file.

The pages of docs/api/ say what of the Python API is public: everything that a line `::: name`
shows. docs/api/index.md lists deprecated names, environment variables and files. The options are
those of the parsers.

The text has to be the same in every version of Python. Annotations are those of the source, and
options are read from the parsers, because argparse has laid out its help in many ways.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pre_kernels import cli
from pre_kernels.integrations import launch

from . import ROOT

API = ROOT / "docs" / "api"
SNAPSHOT = ROOT / "tests" / "data" / "public.txt"
COMMAND = "python -m verify.public --write"
SOURCES = ("pre_kernels", "integrations")
KINDS = inspect.Parameter
# Classes that the library makes. Their constructors are not public.
MADE = {"PreHandle", "TrainerPatch"}


def text() -> str:
    """Return everything that is public."""
    parts = [
        "\n".join(described(name, thing, hidden))
        for page in sorted(API.glob("*.md"))
        for shown, hidden in directives(page.read_text(encoding="utf-8"))
        for name, thing in things(shown)
    ]
    parts += commands()
    for title in ("Deprecated names", "Environment variables", "Files"):
        parts.append("\n".join([title.lower(), *(f"    {name}" for name in listed(title))]))
    return "\n\n".join(parts) + "\n"


def names(of: str) -> set[str]:
    """Return the names in such a text: those of modules, and of the members of classes."""
    found = set()
    owner = ""
    for line in of.partition("\n\ncommand ")[0].splitlines():
        if line.startswith("    ."):
            found.add(owner + line.strip().partition(" ")[0])
        elif line and not line.startswith(" "):
            owner = line.removeprefix("class ").partition(" ")[0]
            found.add(owner)
    return found


def directives(page: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield the name of each line `::: name` of a page, and a pattern of the members that its
    option `filters` hides."""
    for match in re.finditer(r"^::: (\S+)\n((?: .*\n|\n(?= ))*)", page, re.MULTILINE):
        filters = re.findall(r'"!([^"]+)"', match[2])
        yield match[1], re.compile("|".join(["^_", *filters]))


def things(shown: str) -> Iterator[tuple[str, Any]]:
    """Yield what a line `::: shown` shows: the names of a module, or one object."""
    thing = resolved(shown)
    if not isinstance(thing, ModuleType):
        yield shown, thing
        return
    for name in sorted(exported(thing)):
        value = getattr(thing, name)
        if not isinstance(value, ModuleType):
            yield f"{shown}.{name}", value


def exported(module: ModuleType) -> set[str]:
    """Return the public names of a module: its `__all__`, or the functions and classes that it
    defines."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and getattr(value, "__name__", None) == name
    }


def resolved(name: str) -> Any:
    """Return the module of this name, or the object in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        module, _, last = name.rpartition(".")
        return getattr(importlib.import_module(module), last)


def described(name: str, thing: Any, hidden: re.Pattern[str]) -> Iterator[str]:
    """Yield the lines of a function, of a class with its public members, or of a value."""
    if inspect.isclass(thing):
        yield f"class {name}"
        if thing.__name__ not in MADE:
            yield from (f"    {line}" for line in signature(thing))
        yield from members(thing, hidden)
    elif callable(thing):
        yield name
        yield from (f"    {line}" for line in signature(thing))
    else:
        yield f"{name} = {thing!r}"


def members(cls: type, hidden: re.Pattern[str]) -> Iterator[str]:
    """Yield the lines of the methods and attributes that `cls` and its bases in the library have,
    and of the attributes that the docstring lists."""
    found: dict[str, Any] = dict.fromkeys(attributes(cls))
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] == "pre_kernels":
            found |= {name: member for name, member in vars(base).items() if documented(member)}
    for name in sorted(found):
        if hidden.search(name) or name in fields(cls):
            continue
        function = getattr(found[name], "__func__", found[name])
        if inspect.isfunction(function):
            yield f"    .{name}"
            own = ("self", "cls")
            yield from (f"        {line}" for line in signature(function) if line not in own)
        else:
            fixed = isinstance(found[name], property) and found[name].fset is None
            yield f"    .{name}{' (read only)' if fixed else ''}"


def documented(member: Any) -> bool:
    """Whether a member of a class is a method or property with a docstring."""
    kinds = (property, classmethod, staticmethod)
    return (inspect.isfunction(member) or isinstance(member, kinds)) and bool(member.__doc__)


def fields(cls: type) -> set[str]:
    """Return the fields of a dataclass or named tuple, which are in its signature."""
    names = getattr(cls, "_fields", ())
    return {*names, *getattr(cls, "__dataclass_fields__", ())}


def attributes(cls: type) -> list[str]:
    """Return the names under "Attributes:" in the docstring of a class."""
    _, _, after = (inspect.getdoc(cls) or "").partition("\nAttributes:\n")
    lines = after.split("\n\n")[0]
    return [n for names in re.findall(r"^    (\w[\w, ]*):", lines, re.M) for n in names.split(", ")]


def signature(thing: Any) -> Iterator[str]:
    """Yield a line for each parameter, as a signature writes it, and one for what is returned."""
    try:
        whole = inspect.signature(thing)
    except ValueError:
        return
    only = (KINDS.KEYWORD_ONLY, KINDS.VAR_POSITIONAL)
    starred = False
    for each in whole.parameters.values():
        if each.kind is KINDS.KEYWORD_ONLY and not starred:
            yield "*"
        starred = starred or each.kind in only
        star = {KINDS.VAR_POSITIONAL: "*", KINDS.VAR_KEYWORD: "**"}.get(each.kind, "")
        type_ = "" if each.annotation is each.empty else f": {annotation(each.annotation)}"
        default = "" if each.default is each.empty else f" = {value(each.default)}"
        yield f"{star}{each.name}{type_}{default}"
    if whole.return_annotation is not whole.empty and not inspect.isclass(thing):
        yield f"-> {annotation(whole.return_annotation)}"


def annotation(of: Any) -> str:
    """Return an annotation as the source has it: the generated signatures of named tuples wrap
    it."""
    return str(getattr(of, "__forward_arg__", of))


def value(of: Any) -> str:
    """Return a default as the source has it."""
    return str(of.__name__) if callable(of) else repr(of)


def commands() -> Iterator[str]:
    """Yield the text of each command and of the launcher."""
    top = cli.parser()
    (action,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    for prog, parser in [("pre-kernels", top), *((p.prog, p) for p in action.choices.values())]:
        yield "\n".join([f"command {prog}", *options(parser)])
    parser = launch._parser()
    yield "\n".join([f"command {parser.prog}", *options(parser)])


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield a line for each option and argument: names, value, number of values, choices, default.
    Those that help leaves out are not public."""
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        parts = [", ".join(action.option_strings) or str(action.metavar or action.dest)]
        if action.option_strings and action.nargs != 0:
            parts.append(str(action.metavar or f"{{{','.join(action.choices or ())}}}"))
        parts += [str(action.nargs)] if isinstance(action.nargs, str) else []
        if action.choices is not None and action.metavar is not None:
            parts.append(f"one of {', '.join(map(str, action.choices))}")
        if action.nargs != 0 and action.default not in (None, argparse.SUPPRESS):
            default = str(action.default) if isinstance(action.default, Path) else action.default
            parts.append(f"= {default!r}")
        yield f"    {' '.join(parts)}"


def listed(title: str) -> Iterator[str]:
    """Yield the code in the first cell of each row of the table below a heading of
    docs/api/index.md."""
    page = (API / "index.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None, title
    for row in re.findall(r"^\| (.*?) \|", section[1], re.MULTILINE):
        yield from re.findall(r"`([^`]+)`", row)


def variables() -> set[str]:
    """Return the environment variables of the library that its code names."""
    found = set()
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r"\bPRE_KERNELS_[A-Z_]*[A-Z]\b", path.read_text("utf-8")))
    return found


def difference(old: str, new: str) -> str:
    """Return the lines that differ, each with its context."""
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), "tests/data/public.txt", "this code", lineterm="", n=12
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the text, or write it with `--write`."""
    parser = argparse.ArgumentParser(prog="python -m verify.public", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {SNAPSHOT.relative_to(ROOT)}")
    if parser.parse_args(arguments).write:
        SNAPSHOT.write_text(text(), encoding="utf-8")
    else:
        sys.stdout.write(text())


if __name__ == "__main__":
    main()
