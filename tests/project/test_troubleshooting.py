"""docs/troubleshooting.md explains every message with which this library stops or warns, and no
other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pre_kernels.integrations.notices import WARNINGS
from verify import ROOT

GAP = "…"  # stands for a part that is filled in
# The page explains this form once. A name may be missing where argparse puts it in front.
FORM = re.compile(r"([^:]+: )?(got|returned) .*\bwant\b", re.DOTALL)
# Functions that return a message which another function raises or prints.
RETURN_MESSAGES = {"missing", "unwritable", "none_left", "renamed"}
# Messages that nobody sees by themselves, as they stand in the code, and why.
UNSEEN = {
    "module … has no attribute …": "Python's own words, for a name that does not exist",
    "has version …, want …; …": "caught in the same function, and quoted by `cannot be read`",
    "pixels have mode …, want 8 bits for each channel": "caught; quoted by `cannot read … as an`",
    "… failed: …": "caught by `pre-kernels check`, which shows it in its table",
    "…: …": "caught by `pre-kernels check`, which shows it in its table",
    "no … on this system": "the reason in a row of that table",
    "…, …: …": "puts the name of an image in front of another message",
    # Expressions in the place of a message.
    "screen.why(error)": "the system's own reason, with the name of the file",
    "str(error)": "another exception is raised again, or shown by a command",
    "problem": "one of RETURN_MESSAGES",
    "renamed(old, NAMES[old])": "one of RETURN_MESSAGES",
    "none_left(images.folder, len(images.items), tally.left_out)": "one of RETURN_MESSAGES",
    "none_left(self.images.folder, total, more['left_out'])": "one of RETURN_MESSAGES",
    "otherwise": "caught by `pre-kernels check`, which shows it in its table",
}


def files() -> list[Path]:
    return [
        path
        for folder in ("pre_kernels", "integrations")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.relative_to(ROOT).parts[:2] != ("pre_kernels", "integrations")
    ]


def texts(node: ast.expr, names: dict[str, str]) -> list[str]:
    """The texts that an expression may be, with a gap for each part that is not in the code."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return [*texts(node.body, names), *texts(node.orelse, names)]
    if isinstance(node, ast.JoinedStr):
        parts = [
            names.get(ast.unparse(part.value), GAP)
            if isinstance(part, ast.FormattedValue)
            else str(ast.literal_eval(part))
            for part in node.values
        ]
        return ["".join(parts)]
    return [GAP]


def named_texts(body: list[ast.stmt]) -> dict[str, str]:
    """The texts that are kept under a name to be put into messages, at this level or deeper in it,
    but not inside another function."""
    found = {}
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = isinstance(node.value, ast.JoinedStr) or (
                isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            )
            if text:
                found[node.targets[0].id] = texts(node.value, {})[0]
    return found


def collect(source: str) -> list[tuple[int, str]]:
    """The line and the text of every message that a module raises, warns of or fails with. A
    message that is not a text is shown as the code of its expression."""
    return _collect(ast.parse(source).body, {})


def _collect(body: list[ast.stmt], names: dict[str, str]) -> list[tuple[int, str]]:
    names = names | named_texts(body)
    found = []
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found += _collect(node.body, names)
        else:
            waiting += ast.iter_child_nodes(node)
        message = None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if isinstance(node.exc.func, ast.Call):
                continue  # `type(stop)(...)`: a command that was stopped says what it has kept
            message = node.exc.args[-1]  # some exceptions have a kind before it
            if isinstance(message, ast.Constant) and isinstance(message.value, int):
                continue  # an exit status
        elif isinstance(node, ast.Call) and node.args:
            if ast.unparse(node.func) in ("warnings.warn", "fail"):
                message = node.args[0]
        elif isinstance(node, ast.FunctionDef) and node.name in RETURN_MESSAGES:
            returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value]
            found += [
                (node.lineno, text)
                for value in returned
                for text in texts(value, names)
                if text not in ("None", GAP)
            ]
        if message is not None:
            given = texts(message, names)
            given = [ast.unparse(message)] if given == [GAP] else given
            found += [(node.lineno, text) for text in given]
    return found


@cache
def messages() -> tuple[tuple[str, str], ...]:
    """Where each message is, and its text; the warnings of the table are test_docs'."""
    return tuple(
        (f"{path.relative_to(ROOT)}:{line}", text)
        for path in files()
        for line, text in collect(path.read_text(encoding="utf-8"))
        if text != "PRe: …" or path.name != "notices.py"
    )


def page() -> str:
    return (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")


def entries(text: str) -> Iterator[tuple[str, str]]:
    """The message and the explanation of each entry: the code that an item of a list or a row of a
    table begins with."""
    errors = text[text.index("\n## Other warnings") :]
    for item in re.findall(r"^- (.*(?:\n  .*)*)", errors, re.MULTILINE):
        flat = " ".join(item.split())
        head = re.match(r"`[^`]+`(?:(?:, | and )`[^`]+`)*(?: \((\w+)\))?: ", flat)
        assert head is not None, f"no message before a colon: {flat}"
        if head[1] != "torch":
            for message in re.findall(r"`([^`]+)`", head[0]):
                yield message, flat[head.end() :]
    for message, explained in re.findall(r"^\| `([^`]+)` \| (.*) \|$", errors, re.MULTILINE):
        yield message, explained


def matches(entry: str, message: str) -> bool:
    """Whether a message begins with the words of an entry; in both a gap is any text."""
    words = (re.escape(part.strip()) for part in entry.split(GAP))
    return re.match(r"(?s:.*)".join(words), message.replace("`", "")) is not None


def test_every_message_is_explained() -> None:
    known = [entry for entry, _ in entries(page())]
    assert len(messages()) > 200
    missing = [
        f"{where}: {text}"
        for where, text in messages()
        if text not in UNSEEN and not FORM.match(text)
        if not any(matches(entry, text) for entry in known)
    ]
    assert not missing, "\n".join(missing)


def test_every_entry_is_of_a_message() -> None:
    stale = [
        entry
        for entry, _ in entries(page())
        if not any(matches(entry, text) for _, text in messages())
    ]
    assert not stale, "\n".join(stale)


def test_every_entry_says_what_to_do() -> None:
    """And has enough words of its message to be found by them."""
    for entry, explained in entries(page()):
        assert len(explained.split()) >= 3, entry
        assert len(re.findall(r"[A-Za-z]{3,}", entry)) >= 1, entry


def test_what_nobody_sees_is_still_there() -> None:
    assert {text for _, text in messages()} >= UNSEEN.keys()


def test_contents_find_each_warning_by_its_words() -> None:
    text = page()
    contents = text[text.index("## Contents") : text.index("## A forward")]
    found = re.findall(r"- `([^`]+)`:\s+\[([^\]]+)\]", contents)
    assert sorted(name for _, name in found) == sorted(WARNINGS)
    for words, name in found:
        pattern = r".*".join(re.escape(part) for part in words.split(GAP))
        given = re.sub(r"{[^}]*}", GAP, WARNINGS[name])
        assert re.search(pattern, given), name


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise ValueError("a b")', ["a b"]),
        ('raise ValueError(f"{a}: {b!r} c {d:.3f}")', ["…: … c …"]),
        ('raise ValueError("a" if b else f"c {d}")', ["a", "c …"]),
        ('w = f"model: {s}"\nraise ValueError(f"{w} x")', ["model: … x"]),
        ('warnings.warn(f"a {b}", stacklevel=2)', ["a …"]),
        ('def f():\n    return fail("a")', ["a"]),
        ('def missing(a):\n    return f"b {a}" if a else None', ["b …"]),
        ("raise first", []),
        ("raise SystemExit(130)", []),
        ('raise type(stop)("the same command resumes")', []),
        ("raise ValueError(why(a))", ["why(a)"]),
        ('def f():\n    w = "b"\ndef g():\n    raise ValueError(f"{w} c")', ["… c"]),
        ('A = "b"\nclass C:\n    def g():\n        raise ValueError(f"{A} c")', ["b c"]),
    ],
)
def test_how_messages_are_found(source: str, found: list[str]) -> None:
    assert [text for _, text in collect(source)] == found


def test_how_messages_are_matched() -> None:
    assert matches("anchor: … rows entered", "anchor: … rows entered the projector")
    assert matches("head: … is sharded", "head: `…` is sharded (…)")
    assert not matches("rows entered", "anchor: … rows entered the projector")
    assert not matches("anchor: … rows entered", "anchor: … tokens entered")
