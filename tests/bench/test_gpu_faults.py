"""The script for GPU machines when a part hangs, when it is stopped, and when something is
missing."""

import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import torch

from bench import gpu, gpu_stages, record, summary
from verify import ROOT

from .support import HANG, PYTHON, dry


def gone(process):
    state = Path(f"/proc/{process}/stat")
    end = time.monotonic() + 10
    # The process may not have been reaped.
    while state.exists() and state.read_text().split()[2] != "Z":
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_a_part_is_ended_with_all_that_it_started(tmp_path):
    file = tmp_path / "pid"
    child = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {HANG!r}]);"
    child += f"open({str(file)!r}, 'w').write(str(p.pid));"
    start = time.monotonic()
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    assert (
        gpu.run(
            gpu_stages.Part("hangs", [*PYTHON, deaf + child + "time.sleep(60)"], 60), 5.0, tmp_path
        )
        is None
    )
    assert time.monotonic() - start < 9
    for leaves in (None, child):
        if leaves:
            assert gpu.run(gpu_stages.Part("leaves", [*PYTHON, leaves], 60), 20.0, tmp_path) == 0
        assert gone(int(file.read_text()))


def test_what_a_part_prints_is_kept_in_part(tmp_path):
    loud = f"print('first'); print('x' * {3 * gpu.LOG}); print('last'); raise SystemExit(3)"
    assert gpu.run(gpu_stages.Part("quiet", [*PYTHON, "print('before')"], 60), 20.0, tmp_path) == 0
    assert gpu.run(gpu_stages.Part("loud", [*PYTHON, loud], 60), 20.0, tmp_path) == 3
    text = (tmp_path / "log.txt").read_text()
    assert len(text) < gpu.LOG + 1000
    assert text.endswith("last\n")
    assert "before" in text
    assert "first" in text


def test_a_run_that_is_stopped_ends_in_order(tmp_path, monkeypatch, capsys):
    stop = f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM); {HANG}"
    parts = [
        gpu_stages.Part("done", [*PYTHON, ""], 60),
        gpu_stages.Part("stops", [*PYTHON, stop], 60),
        gpu_stages.Part("never", [], 60),
    ]
    monkeypatch.setitem(gpu_stages.STAGES, "all", lambda dry, out: iter(parts))
    before = signal.getsignal(signal.SIGTERM)
    status, lines = dry("all", tmp_path)
    assert status == 130
    assert [(line["item"], line["outcome"]) for line in lines] == [
        ("done", "exit 0"),
        ("stops", "stopped with the run"),
    ]
    assert "what to try next" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_is_stopped_between_two_parts_sums_up_too(tmp_path, monkeypatch, capsys):
    def parts(dry, out):
        yield gpu_stages.Part("done", [*PYTHON, ""], 60)
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_stages.STAGES, "all", parts)
    status, lines = dry("all", tmp_path)
    assert status == 130
    assert [(one["item"], one["outcome"]) for one in lines] == [("done", "exit 0")]
    assert "what to try next" in capsys.readouterr().out


def test_a_summary_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    def fails(folder):
        raise KeyError("a metric that is not there")

    monkeypatch.setattr(summary, "of_folder", fails)
    parts = [gpu_stages.Part(name, [*PYTHON, ""], 60) for name in ("one", "two")]
    monkeypatch.setitem(gpu_stages.STAGES, "all", lambda dry, out: iter(parts))
    status, lines = dry("all", tmp_path)
    assert status == 0
    assert [one["item"] for one in lines] == ["one", "two"]
    assert "a metric that is not there" in (tmp_path / "summary.txt").read_text()
    assert "no summary" in capsys.readouterr().out


def test_a_full_disk_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    def full(path, entry):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record, "append", full)
    monkeypatch.setitem(
        gpu_stages.STAGES, "all", lambda dry, out: iter([gpu_stages.Part("one", [*PYTHON, ""], 60)])
    )
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert f"cannot write {tmp_path / 'dry-run.jsonl'}: No space left" in printed.err
    assert "results in" in printed.out


def test_what_no_time_is_left_for_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        gpu_stages.STAGES,
        "all",
        lambda dry, out: iter([gpu_stages.Part("late", [*PYTHON, ""], 60)]),
    )
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--limit", "5"]) == 0
    assert "late: left out, no time was left" in capsys.readouterr().out


def test_compute_sanitizer(tmp_path, monkeypatch, capsys):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda tool, path=None: None)
    assert list(gpu_stages.sanitize(False, tmp_path)) == []
    assert "compute-sanitizer is missing" in capsys.readouterr().out
    monkeypatch.undo()

    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"\nexit 99\n')
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    parts = list(gpu_stages.sanitize(False, tmp_path))
    assert [part.command[2] for part in parts] == ["memcheck", "racecheck"]
    assert gpu.run(parts[1]._replace(log="log.txt"), 30.0, tmp_path) == 99
    said = (tmp_path / "log.txt").read_text().splitlines()[1]
    assert said.startswith("1 --tool racecheck ")
    assert said.count("--tool") == 1
    assert "-m pytest" in said
    assert "tests/core/test_memory_safety.py -k between_fences" in said


def test_without_a_gpu_the_script_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main([]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "file" / "folder")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "file") in error


def test_a_checkout_that_is_not_installed_is_importable(tmp_path):
    code = "\n".join(
        (
            "import sys",
            "sys.meta_path = [one for one in sys.meta_path if 'editable' not in repr(one).lower()]",
            "import pre_kernels.integrations.families as families",
            "print(families.__file__)",
        )
    )
    command = [*PYTHON, code]
    environment = os.environ | gpu.environment(tmp_path)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == ROOT / "pre_kernels" / "integrations" / "families.py"
