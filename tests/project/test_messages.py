"""The mistakes that people make, and the messages that they get. The tables in `messages/` are the
list: each mistake is made, its message is compared, and what the message leads to is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .messages import attach, loss
from .messages.mistakes import Mistake, heard, matches, words

TABLES = (loss, attach)
EVERY = [(mistake, table.GIVEN) for table in TABLES for mistake in table.MISTAKES]
every_mistake = pytest.mark.parametrize(
    ("mistake", "given"), EVERY, ids=[mistake.about for mistake, _ in EVERY]
)
Makers = dict[str, Callable[[], Any]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for what a mistake writes."""
    monkeypatch.chdir(tmp_path)


@every_mistake
def test_the_message_of_a_mistake(mistake: Mistake, given: Makers) -> None:
    said = heard(mistake.wrong, given)
    assert len(said) == 1, said
    assert matches(mistake.says, said[0]), said[0]


@every_mistake
def test_what_the_message_leads_to_works(mistake: Mistake, given: Makers) -> None:
    assert heard(mistake.right, given) == []
    new = words(mistake.right) - words(mistake.wrong)
    assert not new or new & words(mistake.says), f"the message names none of {new}"
