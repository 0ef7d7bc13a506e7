"""A run that is stopped by ^C or SIGTERM, or by a disk that is full or read-only, says so in one
line, and what it has measured is kept."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from pre_kernels.diagnostics import LayerReport
from pre_kernels.diagnostics.report import page
from pre_kernels.diagnostics.run import parts, run
from verify import ROOT

from .support import Stop, diagnose, document, images, interrupted

# One plot, so that the reports of these tests are soon drawn.
QUICK = ("--metrics", "cosine", "--no-lens", "--maps", 0)
# The place where the signal arrives, the call of it, the signal, and what the last line says.
STAGES = {
    "loading": (run, "load", 1, signal.SIGTERM, "nothing of a is kept; the same command resumes"),
    "measuring": (run, "measure", 4, signal.SIGINT, "3 of 5 images of a are kept; the same"),
    "probes": (LayerReport, "_row", 2, signal.SIGTERM, "5 of 5 images of a are kept; the same"),
    "report": (
        page,
        "html",
        1,
        signal.SIGINT,
        "all is measured and kept; the same",
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_at_any_stage(there, tmp_path, monkeypatch, capsys, stage):
    place, name, call, number, line = STAGES[stage]
    pictures = images(tmp_path / "images", 5)
    out = tmp_path / "out"
    real = getattr(place, name)
    calls = []

    def stopped(*args, **options):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stopped)
        assert diagnose(there / "a", pictures, *QUICK, "--out", out) == 128 + number
    word = "interrupted" if number == signal.SIGINT else "terminated"
    said = capsys.readouterr().err
    assert f"pre-kernels: {word}: {line}" in said
    assert "Traceback" not in said
    assert not (out / "report.html").exists()
    done = interrupted(monkeypatch, 100, Stop())
    assert diagnose(there / "a", pictures, *QUICK, "--out", out) == 0
    assert len(done) == {"loading": 5, "measuring": 2}.get(stage, 0)
    assert document(out)["models"][0]["runs"][0][0]["images"] == 5


CHILD = """
import sys
from pre_kernels import cli
from pre_kernels.diagnostics.run import run

real = run.measure
calls = []

def measure(*args, **options):
    calls.append(args)
    if len(calls) == 3:
        print("here", flush=True)
        sys.stdin.read()  # until the signal
    return real(*args, **options)

run.measure = measure
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_process_that_is_terminated(there, tmp_path, monkeypatch):
    pictures = images(tmp_path / "images", 4)
    command = ["diagnose", there / "a", pictures, *QUICK, "--out", tmp_path / "out"]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as child:
        lines = []
        while (line := child.stdout.readline()) not in ("here\n", ""):
            lines.append(line)
        child.terminate()
        _, said = child.communicate()
    assert child.returncode == 143
    assert "a: loading the model\n" in lines
    assert said.splitlines()[-1] == (
        "pre-kernels: terminated: 2 of 4 images of a are kept; the same command resumes"
    )
    assert "Traceback" not in said
    done = interrupted(monkeypatch, 100, Stop())
    assert diagnose(*command[1:]) == 0
    assert len(done) == 2


@pytest.fixture
def small_disk():
    """Files of more than 48 KiB cannot be written, which the state and the numbers do not need, but
    the report does. The error is EFBIG, and a full disk has another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (48 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_has_no_room_for_the_report(there, tmp_path, capsys, monkeypatch, small_disk):
    pictures = images(tmp_path / "images", 5)
    out = tmp_path / "out"
    assert diagnose(there / "a", pictures, "--out", out) in (1, 2)
    said = capsys.readouterr()
    assert f"cannot write {out / 'report.html'}: File too large; free space there" in said.err
    assert "Traceback" not in said.err
    assert "Cosine" in said.out
    assert document(out)["data"]["images"] == 5
    assert not [*out.glob("*.partial")]
    done = interrupted(monkeypatch, 100, Stop())
    assert diagnose(there / "a", pictures, "--out", out) in (1, 2)
    assert not done


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_state_ends_no_measurement(
    there, tmp_path, capsys, monkeypatch, number
):
    def refused(path, *args, **options):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(LayerReport, "save", lambda self, path, **more: refused(path))
    monkeypatch.setattr(parts.Saver, "now_and_then", lambda self: self.save())
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write", refused)
        out = tmp_path / "out"
        pictures = images(tmp_path / "images", 5)
        assert diagnose(there / "a", pictures, *QUICK, "--out", out) == 0
    assert document(out)["models"][0]["runs"][0][0]["images"] == 5
    said = capsys.readouterr().out
    # Once for the state, although it is saved after each image, and once for the result.
    assert said.count(os.strerror(number)) == 2
    wanted = r"cannot write .*/parts/a-\w+\.safetensors: .*; measuring continues, but it could not "
    assert re.search(wanted, said)


def test_two_runs_into_one_folder(there, tmp_path, capsys):
    pictures = images(tmp_path / "images", 2)
    out = tmp_path / "out"
    (out / "parts").mkdir(parents=True)
    with parts.alone(out):
        assert diagnose(there / "a", pictures, *QUICK, "--out", out) == 2
    assert f"out: got {out}, into which another run is writing, want" in capsys.readouterr().err
    assert diagnose(there / "a", pictures, *QUICK, "--out", out) == 0


def test_parts_of_other_runs_are_named(there, tmp_path, monkeypatch, capsys):
    pictures = images(tmp_path / "images", 4)
    out = tmp_path / "out"
    interrupted(monkeypatch, 2, KeyboardInterrupt())
    assert diagnose(there / "a", pictures, *QUICK, "--out", out) == 130
    assert "also has" not in capsys.readouterr().out
    interrupted(monkeypatch, 100, Stop())
    assert diagnose(there / "a", pictures, "--limit", 3, *QUICK, "--out", out) == 0
    said = capsys.readouterr().out
    assert "resuming" not in said
    wanted = r"parts also has a-\w+\.safetensors \(unfinished\), measured with other settings"
    assert re.search(wanted, said)
    assert diagnose(there / "a", pictures, *QUICK, "--out", out) == 0
    said = capsys.readouterr().out
    assert "a: resuming after 2 of 4 images" in said
    assert re.search(r"parts also has a-\w+\.json, measured with", said)
