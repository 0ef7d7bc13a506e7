"""The mistakes that people make, and the messages that they get. The tables in `messages/` are the
list: each mistake is made, its message is compared, and what the message leads to is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .messages import attach, commands, launcher, loss, measures, saved, trainers
from .messages.mistakes import Mistake, heard, matches, own_words, words

TABLES = (loss, attach, saved, trainers, measures, commands, launcher)
EVERY = [(mistake, table.GIVEN) for table in TABLES for mistake in table.MISTAKES]
every_mistake = pytest.mark.parametrize(
    ("mistake", "given"), EVERY, ids=[mistake.about for mistake, _ in EVERY]
)
Makers = dict[str, Callable[[], Any]]
# Words that only somebody who has read the source would know.
INTERNAL = ("Traceback", "object at 0x", "NoneType", "self.", "pre_kernels/", ".py:")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the mistakes name."""
    folder = tmp_path_factory.mktemp("mistakes")
    commands.make(folder)
    return folder


@pytest.fixture(scope="session")
def done() -> set[str]:
    """What several messages lead to is done once."""
    return set()


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@every_mistake
def test_the_message_of_a_mistake(mistake: Mistake, given: Makers) -> None:
    said = heard(mistake.wrong, given)
    assert len(said) == 1, said
    assert matches(mistake.says, said[0]), said[0]


@every_mistake
def test_what_the_message_leads_to_works(mistake: Mistake, given: Makers, done: set[str]) -> None:
    if mistake.right not in done:
        assert heard(mistake.right, given, parse_only=True) == []
        done.add(mistake.right)
    new = own_words(mistake.right) - words(mistake.wrong)
    assert not new or new & words(mistake.says), f"the message names none of {new}"


@every_mistake
def test_a_message_can_be_read_without_the_source(mistake: Mistake, given: Makers) -> None:
    assert not [word for word in INTERNAL if word in mistake.says]
    assert len(mistake.says) < 600


def test_the_list_is_long_enough_and_repeats_nothing() -> None:
    assert len(EVERY) >= 50
    assert all(len(table.MISTAKES) >= 10 for table in TABLES)
    assert len({mistake.about for mistake, _ in EVERY}) == len(EVERY)
    assert len({mistake.wrong for mistake, _ in EVERY}) == len(EVERY)


@pytest.mark.parametrize(
    ("pattern", "message", "same"),
    [
        ("a: got 1", "a: got 1", True),
        ("a: got 1", "a: got 1, want 2", False),
        ("a: got …, want 2", "a: got\n1, want 2", True),
        ("a: got (…)", "a: got (1)", True),
    ],
)
def test_how_messages_are_matched(pattern: str, message: str, same: bool) -> None:
    assert matches(pattern, message) is same


def test_what_is_heard() -> None:
    assert heard("1 + 1", {}) == []
    assert heard("raise ValueError(name)", {"name": lambda: "text"}) == ["text"]
    warn = "import warnings; warnings.warn('PRe: a'); warnings.warn('b'); raise ValueError('c')"
    assert heard(warn, {}) == ["PRe: a", "c"]
    assert heard("$ pre-kernels env --markdown", {}) == ["--markdown needs --models"]
    assert heard("$ pre-kernels env --markdown --models", {}) == []
