"""Where the records of a measurement go, and what an early end and a full disk leave of them."""

import argparse
import errno
import subprocess

import pytest

from bench import (
    diagnostics,
    evidence,
    fuzz,
    gpu,
    kept,
    mutate,
    profiling,
    record,
    suite,
    tile_sweep,
    training,
    where,
)
from pre_kernels import screen
from pre_kernels.check.device import Cpu
from verify import ROOT

ENTRY = {"kind": "loss", "shape": "tiny", "peer": "eager"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(where, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(where, "UNTRACKED", tmp_path / "untracked")
    monkeypatch.delenv("GPU_OUT", raising=False)
    return tmp_path


def options(*words):
    parser = argparse.ArgumentParser()
    where.add_options(parser.add_argument)
    return parser.parse_args(words)


def run(*words):
    return kept.start(options(*words), Cpu(), pytest.fail)


@pytest.mark.parametrize(
    ("words", "variable", "folder"),
    [
        ((), None, "untracked"),
        ((), "variable", "variable"),
        (("--results", "named"), "variable", "named"),
        (("--out", "named"), None, "named"),
        (("--record",), "variable", "committed"),
    ],
)
def test_only_who_asks_for_it_writes_into_the_committed_results(
    words, variable, folder, folders, monkeypatch
):
    monkeypatch.chdir(folders)
    if variable:
        monkeypatch.setenv("GPU_OUT", variable)
    one = run(*words)
    one.add(ENTRY)
    assert [path.parent.name for path in folders.glob("*/*.jsonl")] == [folder]
    assert one.told()[-1].startswith(f"Records are in {folder}/cpu.jsonl")
    assert ("--record appends" in one.told()[-1]) == (folder == "untracked")


def test_git_ignores_the_default_folder():
    done = subprocess.run(["git", "check-ignore", "bench-out/cpu.jsonl"], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("module", "command"),
    [
        (suite, ["tiny", "fp32"]),
        (profiling, ["ceilings"]),
        (tile_sweep, ["tiles"]),
        (training, []),
        (diagnostics, []),
        (evidence, []),
        (fuzz, ["--cases", "1"]),
        (mutate, ["--sample", "1"]),
        (gpu, ["--dry-run"]),
    ],
)
def test_every_command_has_the_options_and_refuses_a_folder_before_it_measures(
    module, command, folders, capsys
):
    (folders / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(module.main([*command, "--results", str(folders / "file" / "folder")]))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert str(folders / "file") in error
    assert "Not a directory" in error
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(module.main([*command, "--record", "--results", "x"]))
    assert ended.value.code == 2
    assert "--record: got --results x too, want one of them" in capsys.readouterr().err
    assert not list(folders.glob("*/*"))


@pytest.mark.parametrize(
    ("stop", "status", "word"),
    [(KeyboardInterrupt, 130, "^C"), (screen.Terminated, 143, "SIGTERM")],
)
def test_what_ends_a_run_leaves_its_records(stop, status, word, capsys):
    def entries():
        yield ENTRY
        raise stop

    one = run()
    one.every(entries())
    assert one.status == status
    assert one.told()[0] == f"Stopped by {word}: this is what was measured until then."
    assert [line["peer"] for line in record.load([one.path])] == ["eager"]
    assert "1 records, the last: loss tiny eager" in capsys.readouterr().err


def test_a_full_disk_does_not_end_a_run(monkeypatch, capsys):
    def full(path, entry):
        raise OSError(errno.ENOSPC, "No space left on device")

    one = run()
    monkeypatch.setattr(record, "append", full)
    one.every(iter([ENTRY, ENTRY]))
    assert one.records == [ENTRY, ENTRY]
    assert one.status == 1
    problem = f"cannot write {one.path}: No space left on device; "
    assert capsys.readouterr().err.count(problem) == 1
    (line,) = one.told()
    assert line.startswith(f"Some records are only on this screen: {problem}")


def test_a_line_that_was_cut_short_takes_no_other_with_it(tmp_path):
    path = tmp_path / "file.jsonl"
    for number in range(2):
        record.append(path, {"number": number})
    path.write_text(path.read_text()[:-4])
    record.append(path, {"number": 2})
    assert record.load([path]) == [{"number": 0}, {"number": 2}]


def test_the_rest_of_a_run_is_estimated_by_what_was_measured(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(kept.time, "monotonic", lambda: now[0])
    progress = kept.Progress([60.0, 60.0])
    progress.part(0)
    progress.tell("first", 30.0)
    # 30 s as predicted, and another 30 s on trust
    now[0] += 60.0
    progress.tell("second", 30.0)
    assert progress.left() == pytest.approx(90.0 * 90 / 60)
    # What the first part has left out is not waited for.
    progress.part(1)
    progress.tell("third", 60.0)
    progress.tell("between two lines")
    assert capsys.readouterr().err.splitlines() == [
        "1/2 first, about 2 min left",
        "1/2 second, about 2 min left",
        "2/2 third, about 60 s left",
    ]
    assert kept.minutes(3.0) == "about 10 s"
