"""Links of the pages, and the hook by which mkdocs follows those that leave `docs/`.

A page of the site may link to a file of the repository, as `../recipes/trl/README.md`. The file has
to exist, else the build fails. On the site the link leads to the repository's address where
`repo_url` in mkdocs.yml has one, and is plain text otherwise.

mkdocs loads this file by itself, so it imports nothing of the package at the top.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A block of code, a link or picture, inline code: the text of a link may hold pictures and code.
PARTS = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$"
    r"|(?P<picture>!?)\[(?P<text>(?:`[^`\n]*`|!\[[^\]]*\]\([^)]*\)|[^\[\]`])*)\]\((?P<to>[^)\s]+)\)"
    r"|`[^`\n]+`",
    re.DOTALL | re.MULTILINE,
)
# Everything in Markdown that a reader may open but bench/NOTES.md, which tells of what is gone.
PAGES = ("*.md", "bench/README.md", "docs/**/*.md", "examples/**/*.md", "recipes/**/*.md")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:")


def pages(root: Path) -> list[str]:
    """The pages of the repository, as paths from its root."""
    found = {path.relative_to(root) for pattern in PAGES for path in root.glob(pattern)}
    return sorted(path.as_posix() for path in found)


def links(text: str) -> Iterator[re.Match[str]]:
    """Each link and picture outside code, by the groups `picture` ("!" or ""), `text` and `to`."""
    for found in PARTS.finditer(text):
        if found["to"]:
            yield found
            yield from links(found["text"])


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts and the site's `toc` make it."""
    shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    prose = re.sub(r"^(```+|~~~+).*?^\1[ \t]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return {slug(found) for found in re.findall(r"^#{1,6} +(.*?)#*$", prose, re.MULTILINE)}


def dead(root: Path, page: str, text: str) -> list[str]:
    """The links of a page that lead to no file of the repository, or to no heading of a page."""
    wrong = []
    for link in links(text):
        if ELSEWHERE.match(link["to"]):
            continue
        path, _, anchor = link["to"].partition("#")
        target = root / page if not path else Path(os.path.normpath((root / page).parent / path))
        if path and not (target.is_relative_to(root) and target.exists()):
            wrong.append(f"{page}: {link['to']}: got no such file")
        elif anchor and target.suffix == ".md":
            # the page at hand may not be on disk as it is here
            headings = text if not path else target.read_text(encoding="utf-8")
            if anchor not in anchors(headings):
                wrong.append(f"{page}: {link['to']}: got no such heading")
    return wrong


def leaving(
    text: str, page: Path, docs: Path, root: Path, address: str = ""
) -> tuple[str, list[str]]:
    """A page's text with the links that leave `docs` led to `address`, and what is wrong with them.

    Args:
        text: Markdown.
        page: the page's file.
        docs: the folder of all pages.
        root: the repository.
        address: of the repository on the web; "" makes plain text of the links.
    """
    wrong: list[str] = []

    def replaced(found: re.Match[str]) -> str:
        to = found["to"]
        path = (to or "").partition("#")[0]
        target = Path(os.path.normpath(page.parent / path))
        if not path or ELSEWHERE.match(path) or target.is_relative_to(docs):
            return found[0]
        if not target.is_relative_to(root) or not target.exists():
            wrong.append(f"{page.relative_to(root)}: {to}: got no such file of the repository")
        elif found["picture"]:
            wrong.append(
                f"{page.relative_to(root)}: {to}: got a picture outside docs/, want it inside"
            )
        if not address:
            return found["text"]
        kind = "tree" if target.is_dir() else "blob"
        place = os.path.relpath(target, root) + to[len(path) :]
        return f"[{found['text']}]({address.rstrip('/')}/{kind}/HEAD/{place})"

    return PARTS.sub(replaced, text), wrong


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """mkdocs calls it for each page; its warnings fail a strict build."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    text, wrong = leaving(markdown, docs / page.file.src_uri, docs, root, config.repo_url or "")
    for one in wrong:
        logging.getLogger("mkdocs.hooks").warning(one)
    return text
