"""The measurements: every path of their Python runs here at tiny sizes; no figure passes a failed check."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from bench import gpu, memory, peers, record, report, shapes, suite  # noqa: E402
from bench.device import Cpu  # noqa: E402
from pre_kernels import reference  # noqa: E402

TINY = shapes.BY_NAME["tiny"]
STAMP = {"device", "torch", "triton", "date", "commit", "source"}


def pytest_in_bench(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/", *arguments]
    # not this run's options, nor its worker number, with which pytest-benchmark turns itself off
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_pytest_bench_benchmark(tmp_path):
    only = ("--shape", "tiny", "--dtype", "bf16", "--peer", "ours-torch", "--peer", "floor", "--seconds", "0")
    done = pytest_in_bench("--benchmark", *only, "--results", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "| tiny " in done.stdout
    assert "test_loss[tiny-bf16-ours-torch]" in done.stdout
    (file,) = tmp_path.iterdir()
    ours, floor = record.load([file])
    assert (ours["peer"], floor["peer"]) == ("ours-torch", "floor")
    assert floor.keys() >= STAMP | {"median_ms", "q1_ms", "q3_ms", "tflops"}
    assert ours.keys() >= floor.keys() | {"peak_mib", "returned_mib", "error_ratio"}


def test_without_the_option_nothing_is_measured(tmp_path):
    done = pytest_in_bench("--shape", "tiny", "--results", tmp_path)
    assert done.returncode == 0
    assert "pass --benchmark" in done.stdout
    assert not list(tmp_path.iterdir())


def scaled(factor):
    return lambda: lambda **arguments: reference.pre_loss(**arguments) * factor


def test_no_figure_passes_a_failed_check(monkeypatch):
    table = [
        peers.Peer("ours-wrong", "", scaled(1.01), ours=True),
        peers.Peer("ours-coarse", "", scaled(1 + 1e-6), ours=True),
        peers.Peer("other-wrong", "", scaled(1.01)),
        peers.Peer("other-coarse", "", scaled(1 + 1e-6)),  # a few eps: a finding, not a wrong result
        peers.Peer("other-broken", "", lambda: 1 / 0),
        peers.Peer("eager", "", lambda: reference.pre_loss),
    ]
    monkeypatch.setattr(peers, "PEERS", table)
    monkeypatch.setattr(peers, "BY_NAME", {peer.name: peer for peer in table})
    lines = {one["peer"]: one for one in suite.measure(TINY, "fp32", Cpu(), seconds=0, with_memory=False)}
    for name in ("ours-wrong", "ours-coarse", "other-wrong"):
        assert "error" in lines[name]["failed"]
        assert "median_ms" not in lines[name]
    assert lines["other-coarse"]["outside_rule"]
    assert lines["other-coarse"]["median_ms"] > 0
    assert "ZeroDivisionError" in lines["other-broken"]["unavailable"]
    assert lines["eager"]["error_ratio"] == 1
    shown = report.markdown(report.loss_table(lines.values()))
    assert "eager" in shown
    assert "wrong" not in shown


@pytest.mark.skipif(memory.missing() is not None, reason="the peak of a process can be reset on Linux alone")
def test_peak_of_the_process():
    torch.ones(1 << 20, dtype=torch.uint8)
    before = memory._resident("VmRSS")
    memory.RESET.write_text("5")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert 62 < memory._resident("VmHWM") - before < 70


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
    wanted = {"tests": {"test"}, "bench": {"loss"}, "profile": {"sync", "step", "kernel", "workspace"}}
    assert kinds >= wanted.get(stage, {"tile", "sweep"})
    for one in lines:
        assert one.keys() >= STAMP
        assert not one.get("failed"), one
        assert one["dry_run"]


def test_a_part_that_hangs_is_ended(tmp_path):
    start = time.monotonic()
    assert gpu.run(gpu.Part([sys.executable, "-c", "import time; time.sleep(60)"], 60), 1.0, tmp_path) is None
    assert gpu.run(gpu.Part([sys.executable, "-c", "exit(3)"], 60, "log.txt"), 9.0, tmp_path) == 3
    assert time.monotonic() - start < 15


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


def results() -> list[dict]:
    stamp = {"device": "A", "torch": "2", "triton": "3", "date": "2026-01-02T03:04:05", "commit": "c", "group": "g"}
    about = {"kind": "loss", "shape": "tiny", "dtype": "bf16", "n": 200, "d": 128, "m": 96, "z": 64, **stamp}
    figures = {"q1_ms": 1.0, "q3_ms": 4.0, "tflops": 12.0}
    ours = {"peer": "ours-torch", "median_ms": 1.5, "peak_mib": 30.0, "returned_mib": 10.0, "error_ratio": 1.0}
    eager = {"peer": "eager", "median_ms": 3.0, "peak_mib": 110.0, "returned_mib": 10.0, "error_ratio": 1.0}
    return [
        {**about, **figures, **ours},
        {**about, **figures, **eager},
        {**about, **figures, "peer": "floor", "median_ms": 1.0},
        {**about, "peer": "ours-triton", "unavailable": "no GPU"},
    ]


def test_report_and_picture(tmp_path):
    file, readme, picture = tmp_path / "a.jsonl", tmp_path / "README.md", tmp_path / "speed.png"
    alone = {**results()[0], "median_ms": 77.0, "group": "later, without eager beside it"}
    for line in [{**results()[0], "median_ms": 99.0}, *results(), alone]:  # the later of two lines of a key counts
        record.append(file, line)
    with file.open("a") as out:
        out.write('{"kind": "loss", "sha')  # cut short by a kill
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main([str(file), "--readme", str(readme), "--plot", str(picture)])
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    row = next(line for line in text.splitlines() if "ours-torch" in line)
    assert [cell.strip() for cell in row.split("|")[7:13]] == ["0.50", "1.50", "30", "0.27", "0.20", "1.00"]
    assert "2026-01-02, commit c" in text
    assert picture.stat().st_size > 10_000


def test_readme_without_markers_is_an_error(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match=r"readme: .* lacks the lines"):
        report.into_readme(readme, "text")


def test_shapes_are_consistent():
    for shape in shapes.BY_NAME.values():
        assert 0 < shape.visual <= shape.tokens
    assert (shapes.CPU[0].rows, shapes.CPU[0].selected) == (16384, 12288)
    case = shapes.case(TINY, torch.float32, torch.device("cpu"))
    index = shapes.case(TINY, torch.float32, torch.device("cpu"), "index")
    assert case.rows.sum() == TINY.selected
    assert torch.equal(case.rows.reshape(-1).nonzero().squeeze(1), index.rows)
    assert case.upstream != 1
    with pytest.raises(ValueError, match="shape: got"):
        shapes.plan(torch.device("cpu"), ["nonsense"])


def test_committed_results_can_be_read():
    for file in record.RESULTS.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            assert json.loads(line).keys() >= STAMP, file
