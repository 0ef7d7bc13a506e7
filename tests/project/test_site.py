"""The site builds by itself, has what is public, loads nothing from elsewhere, and refuses pages
that name what is not there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verify import ROOT, public
from verify.docs import leaving, pages, slug

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

ENVIRONMENT = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
# Modules whose own docstrings the pages show.
MODULES = {
    "pre_kernels",
    "pre_kernels.reference",
    "pre_kernels.integrations",
    "pre_kernels.diagnostics",
}


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]
    return subprocess.run(
        [*command, str(out)], cwd=root, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository with two pages, one of them of the API."""
    for name in ("pre_kernels", "integrations", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "verify").mkdir()
    shutil.copy(ROOT / "verify" / "docs.py", tmp_path / "verify")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = "nav: [{Home: index.md}, {API: api.md}]\n\nvalidation:"
    text, count = re.subn(r"^nav:\n.*?^validation:", nav, text, flags=re.DOTALL | re.MULTILINE)
    assert count == 1
    (tmp_path / "mkdocs.yml").write_text(text, encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[The file](../README.md)\n")
    (tmp_path / "docs" / "api.md").write_text("# API\n\n::: pre_kernels.reference\n")
    return tmp_path


def test_the_reference_shows_what_is_public_and_nothing_else(site: Path) -> None:
    """Attributes that a docstring lists, and fields in a signature, have no anchor, or have one."""
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    # A module that is the title of its page has the anchor twice, once without dots.
    shown = set(re.findall(r' id="(pre_kernels(?:\.[\w.]+)?)"', text))
    listed = public.names(public.SNAPSHOT.read_text(encoding="utf-8"))
    classes = {
        name: thing
        for each in MODULES
        for name, thing in public.things(each)
        if isinstance(thing, type)
    }
    attributes = {f"{n}.{one}" for n, thing in classes.items() for one in public.attributes(thing)}
    fields = {f"{n}.{one}" for n, thing in classes.items() for one in public.fields(thing)}
    attributes.add("pre_kernels.integrations.pre_callback.PreCallback.handle")
    assert listed - attributes <= shown
    assert shown - fields == (listed & shown) | MODULES


def test_every_page_is_on_the_site(site: Path) -> None:
    of_docs = [Path(page).relative_to("docs") for page in pages(ROOT) if page.startswith("docs/")]
    assert all((site / page).with_suffix(".html").exists() for page in of_docs)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Links may lead away; scripts, styles, fonts and pictures come with the site."""
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)\b[^>]*\ssrc="?(?:https?:)?//', text), path
        assert not re.findall(r'<link\b[^>]*\shref="?(?:https?:)?//', text), path
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_two_pages_that_are_right_build(copy: Path) -> None:
    assert build(copy, copy / "out").returncode == 0


def test_each_fault_of_a_page_is_a_warning_that_stops_the_build(copy: Path) -> None:
    """One build for all of them; the last line counts the warnings."""
    faults = {
        "[a page](gone.md)": "'gone.md'",
        "[a heading](api.md#gone)": "'api.md#gone'",
        "[a heading](#lost)": "'#lost'",
        "[a file](../recipes/gone.md)": "docs/index.md: ../recipes/gone.md",
        "![a picture](pictures/gone.png)": "'pictures/gone.png'",
        "![a picture](../README.md)": "../README.md: got a picture outside docs/",
    }
    with (copy / "docs" / "index.md").open("a", encoding="utf-8") as file:
        file.write("\n" + "\n\n".join(faults) + "\n")
    (copy / "docs" / "unlisted.md").write_text("# Not in the navigation\n")
    done = build(copy, copy / "out")
    assert done.returncode != 0
    warnings = re.findall(r"^WARNING +- +(.*(?:\n(?!\w).*)*)", done.stderr, re.MULTILINE)
    for said in (*faults.values(), "unlisted.md"):
        assert sum(said in warning for warning in warnings) == 1, (said, done.stderr)
    assert f"Aborted with {len(faults) + 1} warnings" in done.stdout, done.stdout + done.stderr


def test_a_name_that_is_not_there_stops_the_build(copy: Path) -> None:
    with (copy / "docs" / "api.md").open("a", encoding="utf-8") as file:
        file.write("\n::: pre_kernels.gone\n")
    done = build(copy, copy / "out")
    assert done.returncode != 0
    assert "pre_kernels.gone" in done.stderr


def test_links_that_leave_the_pages() -> None:
    text = (
        "[a *file*](../README.md#models), [`a folder`](../recipes), [a page](models.md),\n"
        "[the web](https://example.org), `[code](../gone)` and [gone](../gone.md)\n"
    )
    page, docs = ROOT / "docs" / "made_up.md", ROOT / "docs"
    plain, wrong = leaving(text, page, docs, ROOT)
    assert plain == (
        "a *file*, `a folder`, [a page](models.md),\n"
        "[the web](https://example.org), `[code](../gone)` and gone\n"
    )
    assert wrong == ["docs/made_up.md: ../gone.md: got no such file of the repository"]
    led, _ = leaving(text, page, docs, ROOT, "https://example.org/us/")
    assert "[a *file*](https://example.org/us/blob/HEAD/README.md#models)" in led
    assert "[`a folder`](https://example.org/us/tree/HEAD/recipes)" in led


def test_anchors_are_those_of_the_site(site: Path) -> None:
    """`dead` of verify/docs.py judges links by the same rule."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    built = (site / "models.html").read_text(encoding="utf-8")
    assert {slug(found) for found in headings} <= set(re.findall(r'<h\d id="([^"]*)"', built))
    assert slug("`a_b`, λ · c: [what](x.md)?") == "a_b-λ--c-what"
