"""The house style of CONTRIBUTING.md, as far as a test can hold it without false alarms: words, the
width of pages, the length of the README, banners."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator

import pytest

from verify import ROOT
from verify.docs import pages

# pattern: (the plain words, the reason)
WORDS = {
    r"(?<!there )(?<!There )\b(?:is|are|was|were) no (?!(?:longer|more|less|better|worse)\b)": (
        "is not a",
        'after any subject but "there" the negation comes too late',
    ),
    r"(?<!who )(?<!user )\bwants\b": (
        "needs, requires, expects",
        "packages and functions have no wishes",
    ),
    r"\b(?:go|goes|going|went|gone) on\b": (
        "continues, resumes",
        "these are the terms for a run that was interrupted",
    ),
    r"\b[Hh]ad (?:it|they)\b": ("if it had, did it have", "an inversion hides a condition"),
    r"\bas asked\b": ("as requested, as set", "it does not say what sets it"),
    r"\bof before\b": ("earlier, old", "a preposition is not a noun"),
}
FOLDERS = ("pre_kernels", "integrations", "bench", "verify", "examples", "tests")
PAGES = (*pages(ROOT), "bench/NOTES.md")
# These pages quote the words, to tell what to write instead.
QUOTING = ("CONTRIBUTING.md", "AGENTS.md")
COLUMNS = 120
README_LINES = 220


def comments_and_strings(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
            yield from enumerate(token.string.splitlines(), token.start[0])


def prose(page: str) -> Iterator[tuple[int, str]]:
    """The lines of a page outside code blocks, tables and generated parts."""
    fenced = generated = False
    for number, line in enumerate(page.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        generated = (generated or ":begin -->" in line) and ":end -->" not in line
        code = fenced or line.startswith("    ") or line.lstrip().startswith(("```", "|"))
        if not (code or generated):
            yield number, line


def unplain(lines: Iterator[tuple[int, str]]) -> list[str]:
    return [
        f'{number}: got "{match[0].strip()}", want "{plain}": {reason}'
        for number, line in lines
        for pattern, (plain, reason) in WORDS.items()
        if (match := re.search(pattern, line))
    ]


def too_wide(page: str) -> list[str]:
    """The target of a link does not count, since it cannot be broken."""
    return [
        f"{number}: got {len(line)} columns, want at most {COLUMNS}"
        for number, line in prose(page)
        if len(re.sub(r"\]\(.*?\)", "]", line)) > COLUMNS
    ]


def banners(source: str) -> list[str]:
    """A line of signs separates parts of a file that is too long, or that need none."""
    return re.findall(r"^\s*#+ ?[-=*~#]{3}.*$", source, re.MULTILINE)


def fragments(source: str) -> list[str]:
    """Comments whose subject is the name to their left: they cannot be read alone."""
    lines = source.splitlines()
    comments = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    return [
        f"{number}: got {comment!r}, want a comment with a subject"
        for number, comment in comments
        if re.match("# (?:of|by which|for which|with which) ", comment)
        and not (number > 1 and lines[number - 2].lstrip().startswith("#"))
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_sources_are_in_plain_words(folder: str) -> None:
    faults = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.name != "test_words.py":
            lines = unplain(comments_and_strings(source))
            faults[str(path)] = lines + banners(source) + fragments(source)
    assert {name: lines for name, lines in faults.items() if lines} == {}


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_in_plain_words_and_lines_of_few_columns(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert too_wide(text) == []
    if page not in QUOTING:
        assert unplain(prose(text)) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_what_is_not_plain_is_found() -> None:
    source = """# a mask that is no tensor; there is no mask
raise ValueError(f"{name} wants more")  # for the user who wants it
text = "it goes on"
"""
    assert [line.partition(",")[0] for line in unplain(comments_and_strings(source))] == [
        '1: got "is no"',
        '2: got "wants"',
        '3: got "goes on"',
    ]
    source = "x = 1  # of a chunk\n# Two rows\n# of a chunk.\n# of a step\n\n# of a step\n"
    assert [line.partition(":")[0] for line in fragments(source)] == ["1", "6"]
    assert banners("x = 1\n# ----- part\n#!/bin/sh\n") == ["# ----- part"]
    page = f"[{'a' * 118}](target)\n{'b' * 121}\n\n| {'c' * 121} |\n\n```\n{'d' * 121}\n```\n"
    assert too_wide(page) == ["2: got 121 columns, want at most 120"]
