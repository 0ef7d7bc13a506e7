"""The measurements: every path of their Python runs here at tiny sizes; no time passes a failed
check."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from bench import (
    baselines,
    conftest,
    kept_guarantees,
    pace,
    peak_memory,
    profiling,
    record,
    shapes,
    suite,
    tables,
)
from pre_kernels import reference
from pre_kernels.check import memory as resident
from pre_kernels.check.device import Cpu
from verify import ROOT

from .support import STAMP, TINY


def bench_command(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench/", *arguments]
    # not this run's options, nor its worker number, with which pytest-benchmark turns itself off
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    # as on a terminal of 60 columns without Unicode
    environment |= {"COLUMNS": "60", "PYTHONIOENCODING": "ascii"}
    return {"args": command, "cwd": ROOT, "env": environment, "text": True}


def pytest_in_bench(*arguments):
    return subprocess.run(**bench_command(*arguments), capture_output=True, check=False)


FEW = ("--shape", "tiny", "--dtype", "bf16", "--peer", "ours-torch", "--peer", "floor")


def test_pytest_bench_benchmark(tmp_path):
    table = tmp_path / "table" / "table.json"
    table.parent.mkdir()
    done = pytest_in_bench(
        *("--benchmark", *FEW, "--seconds", "0", "--results", tmp_path / "results"),
        f"--benchmark-json={table}",
    )
    assert done.returncode == 0, done.stdout
    assert "1/1 tiny bf16 index: " in done.stderr
    assert " left" in done.stderr
    shown = done.stdout[done.stdout.index(" loss, forward and backward ") :]
    assert "tiny bf16, rows by index: 200 rows, widths 128->96->64" in shown
    assert "\nours-torch " in shown
    assert "floor: the six bare matmuls" in shown
    # A path is not broken.
    assert all(len(line) <= 60 or "/cpu.jsonl" in line for line in shown.splitlines())
    # pytest-benchmark's own table repeats the times in 200 columns.
    assert "test_loss[" not in done.stdout
    (file,) = (tmp_path / "results").iterdir()
    assert f"Records are in {file}." in " ".join(shown.split())
    ours, floor = record.latest(record.load([file]))
    # pytest-benchmark has the samples that were taken, not the time to hand them over.
    medians = [row["stats"]["median"] * 1e3 for row in json.loads(table.read_text())["benchmarks"]]
    # Samples are rounded.
    assert medians == pytest.approx([ours["median_ms"], floor["median_ms"]], rel=1e-4)
    assert (ours["peer"], floor["peer"]) == ("ours-torch", "floor")
    assert floor.keys() >= STAMP | {"median_ms", "q1_ms", "q3_ms", "tflops", "selection"}
    assert ours.keys() >= floor.keys() | {"peak_mib", "returned_mib", "error_ratio", "formula_mib"}


def test_a_stopped_run_keeps_and_shows_what_it_has(tmp_path):
    """SIGTERM comes once the first record is on the disk."""
    file = tmp_path / "cpu.jsonl"
    process = subprocess.Popen(
        **bench_command("--benchmark", *FEW, "--results", tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.02)
    process.terminate()
    shown, error = process.communicate()
    assert process.returncode == 143, shown
    assert "Stopped by SIGTERM: this is what was measured" in shown
    assert str(file) in shown
    assert "Traceback" not in shown + error
    assert record.load([file])[0]["peer"] == "ours-torch"


def test_without_the_option_nothing_is_measured(tmp_path):
    done = pytest_in_bench("--shape", "tiny", "--results", tmp_path)
    assert done.returncode == 0
    assert "`pytest bench/ --benchmark` measures them" in done.stdout
    assert not list(tmp_path.iterdir())


def test_an_option_that_names_nothing_ends_the_run_before_anything_is_collected():
    given = {"--benchmark": True, "--peer": ["aeger"]}
    config = SimpleNamespace(
        getoption=lambda name: given.get(name, []),
        pluginmanager=SimpleNamespace(get_plugin=lambda name: None),
    )
    with pytest.raises(pytest.UsageError, match="--peer: got 'aeger', want one of ours-blas, "):
        conftest.pytest_collection(SimpleNamespace(config=config))


def scaled(factor):
    return lambda: lambda **arguments: reference.pre_loss(**arguments) * factor


def test_no_time_passes_a_failed_check(monkeypatch):
    table = [
        baselines.Baseline("ours-wrong", "", scaled(1.01), ours=True),
        baselines.Baseline("ours-coarse", "", scaled(1 + 1e-6), ours=True),
        baselines.Baseline("other-wrong", "", scaled(1.01)),
        # An error of a few eps is reported, and is not a wrong result.
        baselines.Baseline("other-coarse", "", scaled(1 + 1e-6)),
        baselines.Baseline("other-broken", "", lambda: 1 / 0),
        baselines.Baseline("ours-gated", "", scaled(1.01), ours=True, gate=0.02),
        baselines.Baseline("ours-beyond", "", scaled(1.03), ours=True, gate=0.02),
        baselines.Baseline("ours-nan", "", scaled(float("nan")), ours=True, gate=0.02),
        baselines.Baseline("eager", "", lambda: reference.pre_loss),
    ]
    monkeypatch.setattr(suite, "formula", lambda *_: 0)
    monkeypatch.setattr(baselines, "BASELINES", table)
    monkeypatch.setattr(baselines, "BY_NAME", {baseline.name: baseline for baseline in table})
    lines = {
        entry["peer"]: entry
        for entry in suite.measure(TINY, "fp32", Cpu(), seconds=0, with_memory=False)
    }
    for name in ("ours-wrong", "ours-coarse", "other-wrong"):
        assert "error" in lines[name]["failed"]
        assert "median_ms" not in lines[name]
    assert lines["other-coarse"]["outside_rule"]
    assert lines["other-coarse"]["median_ms"] > 0
    assert "ZeroDivisionError" in lines["other-broken"]["unavailable"]
    assert lines["eager"]["error_ratio"] == 1
    for name in ("ours-beyond", "ours-nan"):
        assert "> 0.02" in lines[name]["failed"]
    assert lines["ours-gated"]["own_rule"] == "relative rms error 0.010 ≤ 0.02"
    shown = tables.markdown(tables.loss_table(lines.values()))
    assert "eager" in shown
    assert "wrong" not in shown
    row = next(line for line in shown.splitlines() if "ours-gated" in line)
    assert row.split("|")[-2].strip().endswith(", own rule")
    assert any(
        "ours-gated" in line and "rule of its own" in line
        for line in tables.refusals(lines.values())
    )


def test_the_workspace_of_a_cpu_is_swept_beside_its_baselines(monkeypatch):
    asked = []
    workspaces = []

    def peak(*named):
        asked.append(named)
        return 3.0, 1.0

    def judged(baseline, *rest):
        workspaces.append(getattr(baseline.build(), "keywords", {}).get("workspace"))
        return in_suite(baseline, *rest)

    in_suite = suite.judged
    monkeypatch.setattr(suite, "judged", judged)
    monkeypatch.setattr(peak_memory, "peak", peak)
    monkeypatch.setattr(
        suite,
        "staged",
        lambda device, steps, seconds: iter([{key: [2.0, 3.0] for key in steps}] * 2),
    )
    names = ["ours-torch", "eager"]
    lines = list(profiling.workspace(Cpu(), TINY, "fp32", names, [1, 64]))
    by_item = {(line["peer"], line.get("item")): line for line in lines}
    assert list(by_item) == [
        ("ours-torch", 1),
        ("ours-torch", 64),
        ("eager", None),
        ("floor", None),
    ]
    assert workspaces == [1 << 20, 64 << 20, None]
    assert len({line["group"] for line in lines}) == 1
    assert all((line["over_floor"], line["median_ms"]) == (1.0, 2.5) for line in by_item.values())
    assert all(
        (line["peak_mib"], line["returned_mib"]) == (3.0, 1.0)
        for line in list(by_item.values())[:3]
    )
    assert asked == [("tiny", "fp32", name, "index", mib) for name, mib in list(by_item)[:3]]
    assert set(profiling.BESIDE["cpu"]) == {"eager", "compile"}


def test_the_peak_depends_on_the_workspace():
    if reason := resident.missing():
        pytest.skip(reason)
    (least, same), (most, returned) = (
        peak_memory.peak("cpu-4k-encoder", "fp32", "ours-torch", "index", x) for x in (2, 64)
    )
    assert same == returned
    assert most - least > 8


def test_what_a_guarantee_raises_is_its_outcome():
    assert kept_guarantees.outcome(lambda: 1 / 0) == "ZeroDivisionError: division by zero"


def test_what_ends_a_measurement_early_leaves_what_was_known(monkeypatch):
    names = ["floor", "eager", "ours-torch"]
    whole = list(suite.measure(TINY, "fp32", Cpu(), names, seconds=30, with_memory=False))
    assert [line["peer"] for line in whole] == ["eager", "ours-torch", *names, *names]
    assert all("median_ms" not in line and line["error_ratio"] > 0 for line in whole[:2])
    assert all(line["floor_ms"] == whole[2]["median_ms"] for line in whole[2:5])
    assert all(
        late["samples"] > early["samples"]
        for early, late in zip(whole[2:5], whole[5:], strict=True)
    )

    sampled = []

    def ends(device, steps, seconds, **options):
        sampled.append(seconds)
        if len(sampled) > 1:
            raise KeyboardInterrupt
        return {name: [2.0, 3.0] for name in steps}

    monkeypatch.setattr(suite, "interleaved", ends)
    kept = []
    with pytest.raises(KeyboardInterrupt):
        kept.extend(suite.measure(TINY, "fp32", Cpu(), names, seconds=9.0, with_memory=False))
    assert [line["median_ms"] for line in kept if "median_ms" in line] == [2.5] * 3


def test_a_shape_that_the_memory_cannot_hold_is_not_tried(monkeypatch):
    monkeypatch.setattr(Cpu, "free", lambda self: 1 << 30)
    assert suite.too_large(TINY, Cpu()) is None
    (line,) = suite.measure(shapes.BY_NAME["qwen25vl-72b"], "bf16", Cpu(), ["ours-blas"])
    assert line["unavailable"] == "judging it takes 8 GiB, of which 1 are free"
    (line,) = profiling.workspace(Cpu(), shapes.BY_NAME["qwen25vl-72b"], "bf16")
    assert line["unavailable"] == "judging it takes 8 GiB, of which 1 are free"
    monkeypatch.setattr(Cpu, "free", lambda self: 79 << 30)
    assert all(suite.too_large(shape, Cpu()) is None for shape in shapes.GPU)


def test_a_step_of_minutes_is_not_waited_for(monkeypatch):
    """The few rows of the estimate take 0.3 s by the clock, and other steps are not taken."""
    now = iter(range(1000))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(now) * 0.3)
    big = shapes.Shape("big", 2, 8000, 6400, 8, 8, 8, "")
    told = []
    lines = list(
        suite.measure(
            big,
            "fp32",
            Cpu(),
            ["ours-torch", "eager"],
            step_limit=10.0,
            tell=lambda what, _: told.append(what),
        )
    )
    assert [line["peer"] for line in lines] == ["ours-torch", "eager"]
    for line in lines:
        assert line["unavailable"] == (
            "the error rule needs eager: a step takes about 15 s here, by the time of 256 of its "
            "rows; --step-limit 30 waits for it (got 10)"
        )
    assert told == ["big fp32 index: making its inputs"]
    for baseline in (baselines.BY_NAME["eager"], baselines.BY_NAME["floor"]):
        assert pace.too_slow(baseline, big, "fp32", Cpu(), 16.0) is None
        assert pace.too_slow(baseline, big, "fp32", Cpu(), 14.0)
        # A small shape is simply measured, and a GPU has the limits of its stages.
        assert pace.too_slow(baseline, TINY, "fp32", Cpu(), 0.0) is None


def test_what_is_told_adds_up_to_the_prediction(monkeypatch):
    monkeypatch.setattr(peak_memory, "peak", lambda *named: (3.0, 1.0))
    names = ["ours-torch", "eager", "floor"]
    told = []
    list(suite.measure(TINY, "fp32", Cpu(), names, 0.5, tell=lambda what, for_: told.append(for_)))
    assert sum(told) == pace.predicted(names, Cpu(), 0.5)
