"""The measurements: every path of their Python runs here at tiny sizes; no time passes a failed
check."""

import json
import os
import subprocess
import sys

import pytest

from bench import (
    baselines,
    cpu_goals,
    kept_guarantees,
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


def pytest_in_bench(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/", *arguments]
    # not this run's options, nor its worker number, with which pytest-benchmark turns itself off
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_pytest_bench_benchmark(tmp_path):
    only = (
        "--shape",
        "tiny",
        "--dtype",
        "bf16",
        "--peer",
        "ours-torch",
        "--peer",
        "floor",
        "--seconds",
        "0",
    )
    table = tmp_path / "table" / "table.json"
    table.parent.mkdir()
    done = pytest_in_bench(
        "--benchmark", *only, "--results", tmp_path / "results", f"--benchmark-json={table}"
    )
    assert done.returncode == 0, done.stdout
    assert "| tiny " in done.stdout
    assert "test_loss[tiny-bf16-index-ours-torch]" in done.stdout
    # It comes after the table of the loss.
    verdict = done.stdout[done.stdout.index("| goal ") :]
    assert "| bf16: time ÷ eager: ≤ 0.6 " in verdict
    # No goal uses that shape.
    assert verdict.count(" not measured in this run ") == len(cpu_goals.GOALS)
    (file,) = (tmp_path / "results").iterdir()
    ours, floor = record.latest(record.load([file]))
    # pytest-benchmark's table shows the samples that were taken, not the time to hand them over.
    medians = [row["stats"]["median"] * 1e3 for row in json.loads(table.read_text())["benchmarks"]]
    # Samples are rounded.
    assert medians == pytest.approx([ours["median_ms"], floor["median_ms"]], rel=1e-4)
    assert (ours["peer"], floor["peer"]) == ("ours-torch", "floor")
    assert floor.keys() >= STAMP | {"median_ms", "q1_ms", "q3_ms", "tflops", "selection"}
    assert ours.keys() >= floor.keys() | {"peak_mib", "returned_mib", "error_ratio", "formula_mib"}


def test_without_the_option_nothing_is_measured(tmp_path):
    done = pytest_in_bench("--shape", "tiny", "--results", tmp_path)
    assert done.returncode == 0
    assert "pass --benchmark" in done.stdout
    assert not list(tmp_path.iterdir())


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
