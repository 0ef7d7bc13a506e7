"""Old names work until the version and the date that their warnings say, and give the same as the
new ones."""

from __future__ import annotations

import datetime
import importlib
import os
import re
import subprocess
import sys

import pytest
from packaging.version import Version

import pre_kernels
from pre_kernels import _moved, cli
from verify import ROOT, public

PAGE = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Deprecated names\n")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| `(.*?)` \| `(.*?)` \|$", SECTION, re.MULTILINE)
# The new name of each old one. Commands stand there with values in capitals, so that they parse.
LISTED: dict[str, str] = {
    re.sub(r" [A-Z]+\b", "", old): re.sub(r" [A-Z]+\b", "", new) for old, new in ROWS
}
IMPORTED = [old for old in LISTED if " " not in old]
TYPED = [old for old in LISTED if " " in old]
MODULES = sorted({old.rpartition(".")[0] for old in IMPORTED})
END = "; the old name goes in 0.3.0, not before 2027-06-01"


def test_every_old_name_is_listed() -> None:
    """Every use of `moved` and every option with an old name adds to `NAMES`."""
    files = [path for folder in public.SOURCES for path in (ROOT / folder).rglob("*.py")]
    using = {path for path in files if re.search(r"= moved\(", path.read_text("utf-8"))}
    assert len({path.resolve() for path in using}) == len(MODULES)
    for module in MODULES:
        importlib.import_module(module)
    cli.parser()
    assert _moved.NAMES == LISTED


def test_the_version_and_the_date_are_said_everywhere_and_have_not_come() -> None:
    assert _moved.renamed("a", "b") == f"a is now b{END}"
    assert Version(pre_kernels.__version__) < Version(_moved.VERSION), "remove the old names"
    datetime.date.fromisoformat(_moved.DATE)
    for page in ("docs/api/index.md", "docs/troubleshooting.md", "CHANGELOG.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert f"in {_moved.VERSION}, not before {_moved.DATE}" in text, page
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for old, new in ROWS:
        assert f"| `{old}` | `{new}` |" in changes, old


@pytest.mark.parametrize("old", IMPORTED)
def test_the_old_path_gives_the_same_object_and_warns(old: str) -> None:
    pytest.importorskip("transformers")
    module, _, name = old.rpartition(".")
    place, _, _ = LISTED[old].rpartition(".")
    scope: dict[str, object] = {}
    text = f"^{re.escape(f'{old} is now {LISTED[old]}{END}')}$"
    with pytest.warns(DeprecationWarning, match=text) as caught:
        exec(compile(f"from {module} import {name}", "the caller's file", "exec"), scope)
    assert scope[name] is getattr(importlib.import_module(place), name)
    files = {warning.filename for warning in caught if "is now" in str(warning.message)}
    assert files == {"the caller's file"}


@pytest.mark.parametrize("old", TYPED)
def test_the_old_option_is_the_new_one_and_says_so(
    old: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, command, option = old.split()
    new = LISTED[old].split()[-1]
    parser = cli.parser()
    expected = parser.parse_args([command, "log", new, "value"])
    assert not capsys.readouterr().err
    assert parser.parse_args([command, "log", option, "value"]) == expected
    assert capsys.readouterr().err == f"{old} is now {LISTED[old]}{END}\n"
    assert parser.parse_args([command, "log"]) != expected
    with pytest.raises(SystemExit):
        parser.parse_args([command, "--help"])
    assert option not in capsys.readouterr().out


@pytest.mark.parametrize("old", MODULES)
def test_another_name_is_none_of_the_module(old: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'nothing'"):
        getattr(importlib.import_module(old), "nothing")  # noqa: B009


def test_importing_the_modules_themselves_warns_of_nothing() -> None:
    """Only a name that has moved warns. This holds under `-W error` too."""
    modules = ", ".join(MODULES)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    code = f"import {modules}; import sys; assert 'transformers' not in sys.modules"
    command = [sys.executable, "-W", "error::DeprecationWarning:pre_kernels", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
