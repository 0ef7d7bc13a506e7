"""What pyproject.toml claims, what the table of docs/models.md says is tested, what is installed;
`python -m verify.versions image` prints a row of that table for an installer, and without a row the
name of the one that CI runs with this Python."""

from __future__ import annotations

import re
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's own there

from . import ROOT

PAGE = ROOT / "docs" / "models.md"
ROWS = ("oldest", "image", "python3.10", "ci", "newest")
# Not in any row of the table: why, and what tests it instead.
UNTESTED = {"flash-attn": "tested where it is installed, on a machine with a GPU"}


def claims() -> dict[str, SpecifierSet]:
    """What is asked for of each package, by the library and by its extras, with this Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, SpecifierSet] = {}
    for line in sum(project["optional-dependencies"].values(), project["dependencies"]):
        asked = Requirement(line)
        if asked.marker and not asked.marker.evaluate():
            continue
        if asked.name not in ("pre-kernels", *UNTESTED):
            found[asked.name] = found.get(asked.name, SpecifierSet()) & asked.specifier
    return found


def oldest() -> dict[str, Version]:
    """The lower bounds."""
    lower = {
        name: [Version(s.version) for s in asked if s.operator == ">="]
        for name, asked in claims().items()
    }
    assert all(lower.values()), (
        f"no lower bound: {[name for name, bounds in lower.items() if not bounds]}"
    )
    return {name: max(bounds) for name, bounds in lower.items()}


def table() -> dict[str, dict[str, Version]]:
    """The rows of docs/models.md: the version of each package that heads a column."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, *lines = (
        text.split("<!-- versions:begin -->\n")[1].split("\n<!-- versions:end -->")[0].splitlines()
    )
    names, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)
    )
    return {
        row[0]: {n: Version(v) for n, v in zip(names, row, strict=True) if re.match(r"\d", v)}
        for row in rows
    }


def installed(name: str) -> Version | None:
    """Without the build: 2.9.0 of 2.9.0+cu128."""
    try:
        return Version(Version(metadata.version(name)).public)
    except metadata.PackageNotFoundError:
        return None


def differences(row: str) -> list[str]:
    """Where what is installed is not what a row of the table says, and for the oldest one not a
    lower bound."""
    wanted = table()[row]
    if row == "oldest":
        wanted = {**wanted, **oldest()}
    # Of the others there may be newer releases than when the table was written.
    exact = row in ("oldest", "image")
    present = {name: installed(name) for name in wanted}
    return [
        f"{name} {present[name]}, want {version}{'' if exact else ' or newer'}"
        for name, version in wanted.items()
        if present[name] is None or (present[name] != version if exact else present[name] < version)
    ]


def ci_row(python: tuple[int, int]) -> str:
    """The row of `make test` in CI. The newest transformers need a newer Python than 3.10."""
    return "python3.10" if python < (3, 11) else "ci"


if __name__ == "__main__":
    if sys.argv[1:]:
        print(*(f"{name}=={version}" for name, version in table()[sys.argv[1]].items()))
    else:
        print(ci_row(sys.version_info[:2]))
