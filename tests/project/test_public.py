"""What is public changes only where tests/data/public.txt and the changelog change with it."""

from __future__ import annotations

import importlib
import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lightning")

from pre_kernels.diagnostics.run import parts
from pre_kernels.fused.kernels import tiles
from pre_kernels.integrations import checkpoint
from verify import ROOT, public

PACKAGES = ("pre_kernels", "pre_kernels.integrations", "pre_kernels.diagnostics")
# The library sets this for processes that it starts.
OWN = {"PRE_KERNELS_NO_SMI"}


def test_what_is_public_is_what_the_file_says() -> None:
    kept = public.SNAPSHOT.read_text(encoding="utf-8")
    now = public.text()
    assert now == kept, (
        f"what is public has changed; `{public.COMMAND}` writes the file again. What was removed "
        "or renamed, and a default that changed, also needs a line in CHANGELOG.md, and the old "
        f"name a place in pre_kernels/_moved.py:\n{public.difference(kept, now)}"
    )


def shown() -> list[str]:
    pages = sorted(public.API.glob("*.md"))
    return [n for page in pages for n, _ in public.directives(page.read_text(encoding="utf-8"))]


def test_the_pages_show_every_package_and_name_each_thing_once() -> None:
    assert {*PACKAGES, "pre_kernels.reference"} <= {*shown()}
    names = [name for each in shown() for name, _ in public.things(each)]
    assert len(names) == len({*names})
    for package in PACKAGES:
        exported = {f"{package}.{name}" for name in importlib.import_module(package).__all__}
        assert exported - {"pre_kernels.reference"} <= {*names}


def test_every_name_is_imported_as_it_is_shown() -> None:
    for each in shown():
        for name, thing in public.things(each):
            module, _, last = name.rpartition(".")
            assert getattr(importlib.import_module(module), last) is thing
            assert public.inspect.getdoc(thing), name


def test_what_a_page_hides_exists() -> None:
    """Else a method that gets another name would become public."""
    for page in public.API.glob("*.md"):
        for each, hidden in public.directives(page.read_text(encoding="utf-8")):
            classes = [thing for _, thing in public.things(each) if isinstance(thing, type)]
            members = {member for cls in classes for member in dir(cls)}
            for word in re.findall(r"\w+", hidden.pattern.replace("^_", "")):
                assert word in members, f"{page.name}: {word}"


def test_environment_variables() -> None:
    assert {*public.listed("Environment variables")} == public.variables() - OWN


def test_files() -> None:
    listed = [*public.listed("Files")]
    kept = {checkpoint.WEIGHTS, checkpoint.CONFIG, *parts.FILES, tiles.cache_file().name}
    assert kept <= {*listed}
    source = "".join(path.read_text("utf-8") for path in (ROOT / "pre_kernels").rglob("*.py"))
    for name in {*listed} - kept:
        assert name in source, name


def test_a_class_is_described_by_what_the_library_gives_it() -> None:
    """A worked example of everything that the text can hold."""

    class Base:
        def inherited(self) -> None:
            """It counts, for its module is in the library."""

    class Thing(Base):
        """A thing.

        Attributes:
            first, second: two.
            third: one.
        """

        def __init__(self, a: int, /, b: str = "x", *rest: int, c: float = 0.5, **more: int):
            pass

        @classmethod
        def made(cls, size: int = 1) -> Thing:
            """A way to make one."""
            return cls(size)

        @property
        def fixed(self) -> int:
            """No setter."""
            return 1

        def hidden(self) -> None:
            """Not shown."""

        def undocumented(self) -> None:
            pass

    Base.__module__ = Thing.__module__ = "pre_kernels.somewhere"
    lines = [*public.described("x.Thing", Thing, re.compile("^_|^hidden$"))]
    assert (
        "\n".join(lines)
        == """\
class x.Thing
    a: int
    b: str = 'x'
    *rest: int
    c: float = 0.5
    **more: int
    .first
    .fixed (read only)
    .inherited
        -> None
    .made
        size: int = 1
        -> Thing
    .second
    .third"""
    )
