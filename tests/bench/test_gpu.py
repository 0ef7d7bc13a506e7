"""The script for GPU machines: every stage dry, and what hangs, crashes, is stopped or is
missing."""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, live_report, memory, profiling, record, shapes, summary, tile_sweep, training

from .test_suite import ROOT, STAMP

PYTHON = [sys.executable, "-c"]
HANG = "import time; time.sleep(600)"


@pytest.fixture
def in_this_process(monkeypatch):
    """Parts of bench/ run here: starting Python again and again would take most of the time."""
    in_processes = gpu.run

    def run(part, seconds, out):
        module = part.command[2] if part.command[:2] == [sys.executable, "-m"] else ""
        if not module.startswith("bench."):
            return in_processes(part, seconds, out)
        return importlib.import_module(module).main(part.command[3:]) or 0

    monkeypatch.setattr(gpu, "run", run)


def dry(stage, out):
    status = gpu.main(["--stage", stage, "--dry-run", "--out", str(out)])
    return status, record.load([out / "dry-run.jsonl"])


def sound(lines):
    for one in lines:
        assert one.keys() >= STAMP | {"run"}
        assert not one.get("failed"), one
        assert one["dry_run"]


@pytest.mark.parametrize("stage", [name for name in gpu.STAGES if name != "all"])
def test_every_stage_of_the_gpu_script(stage, tmp_path, in_this_process, monkeypatch):
    monkeypatch.setattr(training, "peak", lambda *_: 3.0)  # a process each; other tests have it
    status, lines = dry(stage, tmp_path)
    assert status == 0
    sound(lines)
    kinds = {one["kind"] for one in lines}
    wanted = {
        "tests": {"test"},
        "sanitize": {"test"},
        "bench": {"loss"},
        "peers": {"loss"},
        "sweep": {"tile", "sweep"},
    }
    wanted["profile"] = {
        "sync",
        "fullgraph",
        "step",
        "kernel",
        "workspace",
        "firstcall",
        "training",
    }
    assert kinds >= wanted[stage] | {"part"}
    if stage == "bench":
        assert {one["selection"] for one in lines if one["kind"] == "loss"} == set(shapes.ROWS)
    if stage == "profile":
        assert all(one["over_floor"] > 0 for one in lines if one["kind"] == "workspace")
        assert all(one["seconds"] > 0 for one in lines if one["kind"] == "firstcall")
        assert all(one["time_ratio"] > 0 for one in lines if one["kind"] == "training")


def test_the_whole_run(tmp_path, in_this_process, monkeypatch, capsys):
    """With a part that hangs and one that crashes: the others are there, in order, and the summary
    is told."""
    parts = {part.name: part for part in gpu.everything(True, tmp_path)}
    planned = list(parts)
    parts["ceilings"] = parts["ceilings"]._replace(command=[*PYTHON, HANG], limit=7.0)
    parts["compile"] = parts["compile"]._replace(command=[*PYTHON, "import os; os.abort()"])
    # this machine may be slower than one with a GPU
    slow = [
        part._replace(limit=part.limit + 60.0 * (name != "ceilings"))
        for name, part in parts.items()
    ]
    monkeypatch.setitem(gpu.STAGES, "all", lambda dry, out: iter(slow))
    monkeypatch.setattr(
        memory, "peak", lambda *arguments: (3.0, 1.0)
    )  # a process each; other tests have it
    status, lines = dry("all", tmp_path)
    assert status == signal.SIGABRT
    sound(lines)
    outcomes = {one["item"]: one["outcome"] for one in lines if one["kind"] == "part"}
    assert list(outcomes) == planned
    assert outcomes["ceilings"] == "ended at its limit"
    assert outcomes["compile"] == f"exit {-signal.SIGABRT}"
    assert {outcomes[name] for name in planned if name not in ("ceilings", "compile")} == {"exit 0"}
    kinds = {one["kind"] for one in lines}
    assert kinds == {
        "part",
        "loss",
        "hot",
        "test",
        "sync",
        "step",
        "kernel",
        "tile",
        "workspace",
        "fullgraph",
    }
    assert {one["selection"] for one in lines if one["kind"] == "loss"} == set(shapes.ROWS)
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(files) >= {"dry-run.jsonl", "log.txt", "summary.txt"}
    assert len(files) <= 8
    assert max(files.values()) < 16 << 20
    told = (tmp_path / "summary.txt").read_text()
    assert told in capsys.readouterr().out
    assert len(told.splitlines()) <= 39  # with the line of the seconds: 40
    assert "ceilings: ended at its limit; compile: exit -6" in told
    assert gpu.main(["--summary", str(tmp_path)]) == 0
    assert capsys.readouterr().out == told


def test_the_plan_of_the_run_fits_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    parts = list(gpu.everything(False, tmp_path))
    assert sum(part.limit for part in parts) == 495
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names[-1] == "ncu"

    class Parsed(Exception):
        pass

    def parse(parser, argv):
        parsed(parser, argv)
        raise Parsed

    parsed = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for part in parts:  # each command is one that its module takes
        module, *arguments = part.command[part.command.index("-m") + 1 :]
        if module == "pytest":
            files = [word for word in arguments if word.startswith("tests/")]
            assert files
            assert all((ROOT / file).exists() for file in files)
        else:
            with pytest.raises(Parsed):
                importlib.import_module(module).main(arguments)
    assert "def test_random_options(" in (ROOT / "tests" / "core" / "test_loss.py").read_text()


def test_the_compiler_of_the_launchers(tmp_path, monkeypatch):
    """Triton looks for gcc and clang, and takes what CC names."""
    monkeypatch.delenv("CC", raising=False)
    for there, wanted in (({"gcc", "cc"}, None), ({"cc"}, "cc"), (set(), None)):
        monkeypatch.setattr(
            gpu.shutil, "which", lambda tool, there=there: tool if tool in there else None
        )
        assert gpu.environment(tmp_path).get("CC") == wanted


def test_what_fails_is_an_exit_status(tmp_path, monkeypatch):
    for module, function, command in (
        (profiling, "ceilings", ["ceilings"]),
        (tile_sweep, "tiles", ["tiles"]),
    ):
        for line, status in (({"failed": "x"}, 1), ({"unavailable": "x"}, 0)):
            monkeypatch.setattr(
                module, function, lambda *arguments, line=line: iter([{"kind": "tile", **line}])
            )
            assert module.main([*command, "--out", str(tmp_path)]) == status
    waits = {"kind": "sync", "peer": "ours-blas", "item": "mask", "outcome": "waits"}
    monkeypatch.setitem(profiling.WHAT, "syncs", lambda *arguments: iter([waits]))
    assert profiling.main(["syncs", "--out", str(tmp_path)]) == 1


def gone(process):
    state, end = Path(f"/proc/{process}/stat"), time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":  # nobody may have reaped it
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
        gpu.run(gpu.Part("hangs", [*PYTHON, deaf + child + "time.sleep(60)"], 60), 5.0, tmp_path)
        is None
    )
    assert time.monotonic() - start < 9
    for leaves in (None, child):
        if leaves:
            assert gpu.run(gpu.Part("leaves", [*PYTHON, leaves], 60), 20.0, tmp_path) == 0
        assert gone(int(file.read_text()))


def test_what_a_part_prints_is_kept_in_part(tmp_path):
    loud = f"print('first'); print('x' * {3 * gpu.LOG}); print('last'); raise SystemExit(3)"
    assert gpu.run(gpu.Part("quiet", [*PYTHON, "print('before')"], 60), 20.0, tmp_path) == 0
    assert gpu.run(gpu.Part("loud", [*PYTHON, loud], 60), 20.0, tmp_path) == 3
    text = (tmp_path / "log.txt").read_text()
    assert len(text) < gpu.LOG + 1000
    assert text.endswith("last\n")
    assert "before" in text
    assert "first" in text


def test_a_run_that_is_stopped_ends_in_order(tmp_path, monkeypatch, capsys):
    stop = f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM); {HANG}"
    parts = [
        gpu.Part("done", [*PYTHON, ""], 60),
        gpu.Part("stops", [*PYTHON, stop], 60),
        gpu.Part("never", [], 60),
    ]
    monkeypatch.setitem(gpu.STAGES, "all", lambda dry, out: iter(parts))
    before = signal.getsignal(signal.SIGTERM)
    status, lines = dry("all", tmp_path)
    assert status == 130
    assert [(one["item"], one["outcome"]) for one in lines] == [
        ("done", "exit 0"),
        ("stops", "stopped with the run"),
    ]
    assert "what to try next" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_is_stopped_between_two_parts_sums_up_too(tmp_path, monkeypatch, capsys):
    def parts(dry, out):
        yield gpu.Part("done", [*PYTHON, ""], 60)
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.STAGES, "all", parts)
    status, lines = dry("all", tmp_path)
    assert status == 130
    assert [(one["item"], one["outcome"]) for one in lines] == [("done", "exit 0")]
    assert "what to try next" in capsys.readouterr().out


def test_a_summary_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    def fails(folder):
        raise KeyError("a figure that is not there")

    monkeypatch.setattr(summary, "of_folder", fails)
    parts = [gpu.Part(name, [*PYTHON, ""], 60) for name in ("one", "two")]
    monkeypatch.setitem(gpu.STAGES, "all", lambda dry, out: iter(parts))
    status, lines = dry("all", tmp_path)
    assert status == 0
    assert [one["item"] for one in lines] == ["one", "two"]
    assert "a figure that is not there" in (tmp_path / "summary.txt").read_text()
    assert "no summary" in capsys.readouterr().out


def test_a_full_disk_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "dry-run.jsonl").symlink_to("/dev/full")
    monkeypatch.setitem(
        gpu.STAGES, "all", lambda dry, out: iter([gpu.Part("one", [*PYTHON, ""], 60)])
    )
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left" in error


def test_what_no_time_is_left_for_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        gpu.STAGES, "all", lambda dry, out: iter([gpu.Part("late", [*PYTHON, ""], 60)])
    )
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--limit", "5"]) == 0
    assert "late: left out, no time" in capsys.readouterr().out


def test_compute_sanitizer(tmp_path, monkeypatch, capsys):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda tool, path=None: None)
    assert list(gpu.sanitize(False, tmp_path)) == []
    assert "compute-sanitizer is missing" in capsys.readouterr().out
    monkeypatch.undo()

    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"\nexit 99\n')
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    parts = list(gpu.sanitize(False, tmp_path))
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
    command, environment = [*PYTHON, code], os.environ | gpu.environment(tmp_path)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == ROOT / "pre_kernels" / "integrations" / "families.py"


LOSES = """
import os
import pytest
from bench import live_report

def say(number):
    with open(os.environ["GPU_OUT"] + "/ran", "a") as out:
        out.write(f"{number} {os.getpid()}\\n")

@pytest.mark.parametrize("number", range(3))
def test_before(number):
    say(number)

def test_is_refused():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")

def test_loses_the_device():
    say("lost")
    live_report.works = lambda: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.parametrize("number", range(3, 9))
def test_after(number):
    say(number)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_device_costs_the_tests_of_its_worker_alone(workers, tmp_path):
    (tmp_path / "test_fake.py").write_text(LOSES)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment |= gpu.environment(tmp_path, dry=True)
    command = [*gpu._pytest(str(tmp_path), "--rootdir", str(tmp_path)), "-n", str(workers)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    lines = record.load([tmp_path / "dry-run.jsonl"])
    ran = dict(line.split() for line in (tmp_path / "ran").read_text().splitlines())
    outcomes = {one["item"].partition("::")[2]: one["outcome"] for one in lines}
    assert outcomes["test_loses_the_device"] == "failed"
    assert (
        "illegal memory access"
        in [one["message"] for one in lines if one["outcome"] == "failed"][-1]
    )
    assert outcomes["test_is_refused"] == "failed"  # and nothing else came of it
    assert len(lines) == len(outcomes)  # that its worker ended is no second failure
    if workers:
        assert {str(number) for number in range(9)} | {"lost"} == set(ran)
        assert list(outcomes.values()).count("passed") == 9
        assert ran["2"] == ran["lost"] != ran["3"]
    else:
        assert "3" not in ran
        assert "lost the device to an error of CUDA" in done.stdout


def test_a_file_that_cannot_be_collected_is_a_failed_test(tmp_path):
    (tmp_path / "test_fake.py").write_text("import nonsense_that_is_nowhere")
    environment = os.environ | gpu.environment(tmp_path, dry=True)
    command = gpu._pytest(str(tmp_path), "--rootdir", str(tmp_path))
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    (line,) = record.load([tmp_path / "dry-run.jsonl"])
    assert (line["kind"], line["outcome"]) == ("test", "failed")
    assert "nonsense_that_is_nowhere" in line["message"]


def test_both_names_of_a_lost_device():
    for text in (
        "RuntimeError: CUDA error: device-side assert",
        "RuntimeError: Triton Error [CUDA]: an illegal",
    ):
        assert live_report.SUSPECT.search(text)
    assert live_report.works()
    assert not live_report.SUSPECT.search("torch.OutOfMemoryError: CUDA out of memory")
