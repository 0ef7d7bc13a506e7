"""Records: their stamp, which of them count, and the committed ones."""

import json
import subprocess

import pytest

from bench import record
from verify import ROOT

from .support import STAMP, results


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Return a small checkout, with the link of the real one."""
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for folder in ("pre_kernels", "integrations", "bench/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pre_kernels" / "loss.py").write_text("loss")
    (tmp_path / "integrations" / "attach.py").write_text("attach")
    (tmp_path / "pre_kernels" / "integrations").symlink_to("../integrations")
    return tmp_path


EDITS = ("pre_kernels/loss.py", "integrations/attach.py")


@pytest.mark.parametrize("file", EDITS)
def test_an_edit_of_what_is_measured_is_another_source(file, checkout):
    before = record._source.__wrapped__()
    assert record._source.__wrapped__() == before
    (checkout / file).write_text("edited")
    assert record._source.__wrapped__() != before


def test_every_source_counts_once():
    files = [path.resolve() for path in record.files()]
    assert len(set(files)) == len(files)
    assert {ROOT / "integrations" / "attach.py", ROOT / "pre_kernels" / "loss.py"} <= set(files)


@pytest.mark.parametrize(
    ("file", "dirty"),
    [
        *((file, True) for file in EDITS),
        ("bench/suite.py", True),
        ("bench/results/cpu.jsonl", False),
    ],
)
def test_a_commit_is_dirty_where_what_is_measured_was_edited(file, dirty, checkout):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=checkout, capture_output=True, check=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "text")
    clean = record._commit.__wrapped__()
    assert len(clean) == 12
    (checkout / file).write_text("edited")
    assert record._commit.__wrapped__() == clean + "-dirty" * dirty


def test_a_run_that_was_judged_but_never_timed_hides_no_times():
    verdicts = [
        {k: v for k, v in one.items() if k != "median_ms"} | {"group": "late"} for one in results()
    ]
    assert record.latest([*results(), *verdicts]) == results()


def test_committed_results_can_be_read():
    for file in record.RESULTS.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            assert json.loads(line).keys() >= STAMP, file
