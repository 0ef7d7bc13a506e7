"""The script for GPU machines: every stage as a dry run, the whole run, and its plan."""

import argparse
import importlib
import signal
import sys

import pytest

from bench import baselines, gpu, gpu_stages, peak_memory, profiling, shapes, tile_sweep, training
from pre_kernels.check import device
from pre_kernels.check.device import Cuda
from verify import ROOT

from .support import HANG, PYTHON, STAMP, dry


@pytest.fixture
def in_this_process(monkeypatch):
    """Parts of bench/ run in this process, since starting Python again and again would take most of
    the time."""
    in_processes = gpu.run

    def run(part, seconds, out):
        module = part.command[2] if part.command[:2] == [sys.executable, "-m"] else ""
        if not module.startswith("bench."):
            return in_processes(part, seconds, out)
        return importlib.import_module(module).main(part.command[3:]) or 0

    monkeypatch.setattr(gpu, "run", run)


def sound(lines):
    for one in lines:
        assert one.keys() >= STAMP | {"run"}
        assert not one.get("failed"), one
        assert one["dry_run"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [name for name in gpu_stages.STAGES if name != "all"])
def test_every_stage_of_the_gpu_script(stage, tmp_path, in_this_process, monkeypatch):
    # Each takes its own process, and other tests run it.
    monkeypatch.setattr(training, "peak", lambda *_: 3.0)
    status, lines = dry(stage, tmp_path)
    assert status == 0
    sound(lines)
    kinds = {line["kind"] for line in lines}
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
        assert {line["selection"] for line in lines if line["kind"] == "loss"} == set(shapes.ROWS)
    if stage == "profile":
        assert all(line["over_floor"] > 0 for line in lines if line["kind"] == "workspace")
        assert all(line["seconds"] > 0 for line in lines if line["kind"] == "firstcall")
        assert all(line["time_ratio"] > 0 for line in lines if line["kind"] == "training")


def test_the_whole_run(tmp_path, in_this_process, monkeypatch, capsys):
    """With a part that hangs and one that crashes: the others are there, in order, and the summary
    is told."""
    parts = {part.name: part for part in gpu_stages.everything(True, tmp_path)}
    planned = list(parts)
    parts["ceilings"] = parts["ceilings"]._replace(command=[*PYTHON, HANG], limit=7.0)
    parts["compile"] = parts["compile"]._replace(command=[*PYTHON, "import os; os.abort()"])
    # This machine may be slower than one with a GPU.
    slow = [
        part._replace(limit=part.limit + 60.0 * (name != "ceilings"))
        for name, part in parts.items()
    ]
    monkeypatch.setitem(gpu_stages.STAGES, "all", lambda dry, out: iter(slow))
    # Each takes its own process, and other tests run it.
    monkeypatch.setattr(peak_memory, "peak", lambda *arguments: (3.0, 1.0))
    status, lines = dry("all", tmp_path)
    assert status == signal.SIGABRT
    sound(lines)
    outcomes = {line["item"]: line["outcome"] for line in lines if line["kind"] == "part"}
    assert list(outcomes) == planned
    assert outcomes["ceilings"] == "ended at its limit"
    assert outcomes["compile"] == f"exit {-signal.SIGABRT}"
    assert {outcomes[name] for name in planned if name not in ("ceilings", "compile")} == {"exit 0"}
    kinds = {line["kind"] for line in lines}
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
    assert {line["selection"] for line in lines if line["kind"] == "loss"} == set(shapes.ROWS)
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(files) >= {"dry-run.jsonl", "log.txt", "summary.txt"}
    assert len(files) <= 8
    assert max(files.values()) < 16 << 20
    told = (tmp_path / "summary.txt").read_text()
    assert told in capsys.readouterr().out
    # 40 with the line of the seconds
    assert len(told.splitlines()) <= 39
    assert "ceilings: ended at its limit; compile: exit -6" in told
    assert gpu.main(["--summary", str(tmp_path)]) == 0
    assert capsys.readouterr().out == told


def test_the_plan_of_the_run_fits_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    parts = list(gpu_stages.everything(False, tmp_path))
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
    # Each command is one that its module accepts.
    for part in parts:
        module, *arguments = part.command[part.command.index("-m") + 1 :]
        if module == "pytest":
            files = [word for word in arguments if word.startswith("tests/")]
            assert files
            assert all((ROOT / file).exists() for file in files)
        else:
            # `python -m` runs the __main__ of a package, which has the main of its commands.
            name = f"{module}.cli" if module == "pre_kernels" else module
            with pytest.raises(Parsed):
                importlib.import_module(name).main(arguments)
    assert "def test_random_options(" in (ROOT / "tests" / "core" / "test_loss.py").read_text()


@pytest.mark.parametrize("stage", ["all", "tests", "sanitize"])
def test_tests_that_a_stage_names_exist(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_stages, "sanitizer", lambda: "compute-sanitizer")
    words = [word for part in gpu_stages.STAGES[stage](False, tmp_path) for word in part.command]
    named = [word.removeprefix("--ignore=") for word in words]
    files = {name for name in named if name.startswith("tests")}
    assert files
    assert all((ROOT / file).exists() for file in files)


def test_the_stage_of_all_baselines_ends_with_what_is_tuned_for_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "current", Cuda)
    parts = list(gpu_stages.costly(False, tmp_path))
    assert len(parts) == 2 * baselines.COSTLY
    for number, part in enumerate(parts):
        names = part.command[part.command.index("--peers") + 1 :]
        assert ("quack" in names) == (number >= baselines.COSTLY)
        assert "floor" in names


def test_the_compiler_of_the_launchers(tmp_path, monkeypatch):
    """Triton looks for gcc and clang, and uses the compiler that CC names."""
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
