"""The script for GPU machines: every stage dry, and what hangs, fails or is missing."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_bench import ROOT, STAMP

from bench import gpu, record, shapes


@pytest.mark.parametrize("stage", gpu.STAGES)
def test_every_stage_of_the_gpu_script(stage, tmp_path, monkeypatch):
    """In this process, but for pytest's own part: starting Python again and again would take most of the time."""
    monkeypatch.setenv("BENCH_DRY_RUN", "1")
    in_processes = gpu.run

    def run(part, seconds, out, dry):
        module = part.command[2] if part.command[0] == sys.executable else ""
        if not module.startswith("bench."):
            return in_processes(part, seconds, out, dry)
        monkeypatch.setenv("GPU_OUT", str(out))
        return importlib.import_module(module).main(part.command[3:]) or 0

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main(["--stage", stage, "--dry-run", "--out", str(tmp_path)]) == 0
    lines = record.load([tmp_path / "dry-run.jsonl"])
    kinds = {one["kind"] for one in lines}
    wanted = {"tests": {"test"}, "sanitize": {"test"}, "bench": {"loss"}, "peers": {"loss"}, "sweep": {"tile", "sweep"}}
    wanted["profile"] = {"sync", "fullgraph", "step", "kernel", "workspace", "firstcall", "training"}
    assert kinds >= wanted[stage]
    if stage == "bench":
        assert {one["selection"] for one in lines} == set(shapes.ROWS)
    if stage == "profile":
        assert all(one["over_floor"] > 0 for one in lines if one["kind"] == "workspace")
        assert all(one["seconds"] > 0 for one in lines if one["kind"] == "firstcall")
        assert all(one["time_ratio"] > 0 for one in lines if one["kind"] == "training")
    for one in lines:
        assert one.keys() >= STAMP
        assert not one.get("failed"), one
        assert one["dry_run"]


def test_a_part_that_hangs_is_ended(tmp_path):
    start = time.monotonic()
    assert gpu.run(gpu.Part([sys.executable, "-c", "import time; time.sleep(60)"], 60), 1.0, tmp_path) is None
    assert gpu.run(gpu.Part([sys.executable, "-c", "exit(3)"], 60, "log.txt"), 9.0, tmp_path) == 3
    assert time.monotonic() - start < 15


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
    said = (tmp_path / "log.txt").read_text()
    assert said.startswith("1 --tool racecheck ")
    assert "-m pytest" in said
    assert "tests/test_memory_safety.py -k between_fences" in said


def test_without_a_gpu_the_script_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--stage", "bench"]) == 2
    assert "No GPU" in capsys.readouterr().err


def test_a_checkout_that_is_not_installed_is_importable(tmp_path):
    code = "\n".join(
        (
            "import sys",
            "sys.meta_path = [one for one in sys.meta_path if 'editable' not in repr(one).lower()]",
            "import pre_kernels.integrations.families as families",
            "print(families.__file__)",
        )
    )
    command, environment = [sys.executable, "-c", code], gpu.environment(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "integrations" / "families.py"
