"""The files of a release say the same version and address, and the hosted CI runs what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from pre_kernels import __version__
from verify import ROOT, dist, hub

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_version_is_in_changelog_and_citation() -> None:
    (date,) = re.findall(rf"^## \[{re.escape(__version__)}\] - (.*)$", CHANGELOG, re.MULTILINE)
    assert CITATION["version"] == __version__
    assert str(CITATION["date-released"]) == date


def test_addresses_are_those_of_the_repository() -> None:
    repository = PROJECT["urls"]["Repository"]
    for name, url in PROJECT["urls"].items():
        assert name == "Paper" or url.startswith(repository)
    assert CITATION["repository-code"] == repository


def test_classifiers_and_workflow_name_the_same_pythons() -> None:
    """The oldest is what `requires-python` asks for."""
    named = [
        Version(line.rpartition(" ")[2])
        for line in PROJECT["classifiers"]
        if re.search(r":: 3\.\d+$", line)
    ]
    assert named == sorted(named)
    assert PROJECT["requires-python"] == f">={named[0]}"
    tried = yaml.safe_load(WORKFLOW)["jobs"]["cpu"]["strategy"]["matrix"]["python"]
    assert [Version(python) for python in tried] == [named[0], named[-1]]


def test_the_workflow_runs_what_ci_and_a_gpu_run() -> None:
    jobs = yaml.safe_load(WORKFLOW)["jobs"]
    commands = {name: [step.get("run") for step in job["steps"]] for name, job in jobs.items()}
    assert "bash .ci/run" in commands["cpu"]
    assert any(str(command).startswith("make gpu") for command in commands["gpu"])
    assert "self-hosted" in jobs["gpu"]["runs-on"]
    # Code of a pull request does not run on the project's own machine.
    assert "github.event_name != 'pull_request'" in jobs["gpu"]["if"]


def test_the_workflow_has_few_rights_and_pinned_actions() -> None:
    assert yaml.safe_load(WORKFLOW)["permissions"] == {"contents": "read"}
    uses = re.findall(r"uses: (\S+)", WORKFLOW)
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in uses)


def test_build_tools_are_pinned() -> None:
    lines = dist.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = map(Requirement, tomllib.loads(text)["build-system"]["requires"])
    for requirement in needed:
        (pin,) = [pin for pin in pinned if pin.name == requirement.name]
        (version,) = pin.specifier
        assert version.operator == "=="
        assert version.version in requirement.specifier


def test_the_page_of_the_package_index_has_whole_links() -> None:
    """Links to files of the repository become addresses of this release's files."""
    command = [sys.executable, "setup.py", "--quiet", "--long-description"]
    page = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert len(links) > 20
    assert all(link.startswith(("https://", "#")) for link in links)
    base = PROJECT["urls"]["Repository"]
    assert f"({base}/raw/v{__version__}/docs/pictures/" in page
    assert f"({base}/blob/v{__version__}/docs/training.md)" in page
    for link in links:
        if link.startswith(f"{base}/"):
            file = link.split(f"/v{__version__}/")[1].partition("#")[0]
            assert (ROOT / file).exists(), link


@pytest.mark.parametrize("module", [dist, hub])
def test_files_that_are_not_committed_are_refused(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist, "git", lambda *_: "?? pre_kernels/scratch.py\n M setup.py\n")
    monkeypatch.setattr(sys, "argv", ["build"])
    with pytest.raises(SystemExit):
        module.main()
    said = capsys.readouterr().err
    assert "got files that are not committed, pre_kernels/scratch.py, setup.py; want" in said


@pytest.mark.parametrize("module", [dist, hub])
def test_a_folder_with_other_files_is_not_replaced(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr(sys, "argv", ["build", "--allow-dirty", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        module.main()
    assert (tmp_path / "mine.txt").exists()
