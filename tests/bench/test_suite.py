"""The measurements: every path of their Python runs here at tiny sizes; no figure passes a failed
check."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import (
    baselines,
    compositions,
    goals,
    guarantees,
    memory,
    profiling,
    record,
    report,
    shapes,
    suite,
    tile_sweep,
    training,
)
from pre_kernels import reference  # noqa: E402
from pre_kernels.check import memory as resident  # noqa: E402
from pre_kernels.check.device import Cpu, Cuda  # noqa: E402
from pre_kernels.check.rule import Judge, run  # noqa: E402
from verify import ROOT

TINY = shapes.BY_NAME["tiny"]
STAMP = {"device", "torch", "triton", "date", "commit", "source"}


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
    verdict = done.stdout[done.stdout.index("| goal ") :]  # after the table of the loss
    assert "| bf16: time ÷ eager: ≤ 0.6 " in verdict
    assert verdict.count(" not measured in this run ") == len(
        goals.CPU_GOALS
    )  # of a shape that no goal is of
    (file,) = (tmp_path / "results").iterdir()
    ours, floor = record.latest(record.load([file]))
    # pytest-benchmark's table has the samples that were taken, not the time it took to hand them
    # over
    medians = [row["stats"]["median"] * 1e3 for row in json.loads(table.read_text())["benchmarks"]]
    assert medians == pytest.approx(
        [ours["median_ms"], floor["median_ms"]], rel=1e-4
    )  # samples are rounded
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


def test_no_figure_passes_a_failed_check(monkeypatch):
    table = [
        baselines.Peer("ours-wrong", "", scaled(1.01), ours=True),
        baselines.Peer("ours-coarse", "", scaled(1 + 1e-6), ours=True),
        baselines.Peer("other-wrong", "", scaled(1.01)),
        baselines.Peer(
            "other-coarse", "", scaled(1 + 1e-6)
        ),  # a few eps: a finding, not a wrong result
        baselines.Peer("other-broken", "", lambda: 1 / 0),
        baselines.Peer("ours-gated", "", scaled(1.01), ours=True, gate=0.02),
        baselines.Peer("ours-beyond", "", scaled(1.03), ours=True, gate=0.02),
        baselines.Peer("ours-nan", "", scaled(float("nan")), ours=True, gate=0.02),
        baselines.Peer("eager", "", lambda: reference.pre_loss),
    ]
    monkeypatch.setattr(suite, "formula", lambda *_: 0)
    monkeypatch.setattr(baselines, "PEERS", table)
    monkeypatch.setattr(baselines, "BY_NAME", {peer.name: peer for peer in table})
    lines = {
        one["peer"]: one for one in suite.measure(TINY, "fp32", Cpu(), seconds=0, with_memory=False)
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
    shown = report.markdown(report.loss_table(lines.values()))
    assert "eager" in shown
    assert "wrong" not in shown
    row = next(line for line in shown.splitlines() if "ours-gated" in line)
    assert row.split("|")[-2].strip().endswith(", own rule")
    assert any(
        "ours-gated" in line and "rule of its own" in line
        for line in report.refusals(lines.values())
    )


COMPOSITIONS = {
    "viral": (lambda: compositions.viral, {}),
    # on a CPU the epilogue is the erf gelu
    "addmm-activation": (lambda: compositions.addmm_activation, {"activation": "gelu"}),
    "liger": (lambda: compositions.liger(compiled=False, chunk_size=64), {}),
}


@pytest.mark.parametrize("rows", shapes.ROWS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_are_within_the_error_rule(name, rows):
    assert name in baselines.BY_NAME
    if name == "liger":
        pytest.importorskip("liger_kernel.chunked_loss")
    build, options = COMPOSITIONS[name]
    case = shapes.case(TINY, torch.float32, torch.device("cpu"), rows)
    case.options = options
    assert Judge(case)(build()).failure is None


def test_a_graph_that_was_not_chunked_is_no_measurement(monkeypatch):
    if reason := baselines.BY_NAME["compile-chunked"].missing(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    from torch._inductor import metrics

    assert callable(compositions.compiled_in_chunks())  # inductor knows the options
    monkeypatch.setattr(torch, "compile", lambda function, options: function)
    case = shapes.case(TINY, torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="left the graph whole"):
        run(compositions.compiled_in_chunks(), case)

    def chunked(**arguments):
        metrics.num_auto_chunking += 1
        return reference.pre_loss(**arguments)

    monkeypatch.setattr(torch, "compile", lambda function, options: chunked)
    assert Judge(case)(compositions.compiled_in_chunks()).error_ratio == 1


def test_what_is_compiled_for_minutes_is_measured_on_the_first_shapes_alone():
    assert set(baselines.planned(0)) == set(baselines.BY_NAME)
    assert set(baselines.planned(0)) - set(baselines.planned(2)) == {
        "compile-max",
        "compile-chunked",
        "liger",
    }
    assert set(baselines.planned(2)) - set(baselines.planned(baselines.COMPILED)) == {"compile"}
    plan = shapes.plan(torch.device("cuda"))
    assert plan[0] == (shapes.BY_NAME[goals.MAIN], "bf16", "index")
    assert (shapes.BY_NAME[goals.MAIN], "bf16", "mask") in plan
    assert (shapes.BY_NAME[goals.SMALL], "bf16", "index") in plan[
        : baselines.COMPILED
    ]  # a goal: faster than compile there
    assert {shape for shape, _, _ in plan} == set(shapes.GPU)


def test_the_plan_of_a_cpu():
    plan = [(shape.name, dtype, rows) for shape, dtype, rows in shapes.plan(torch.device("cpu"))]
    assert len(set(plan)) == len(plan)
    assert {name for name, _, _ in plan} == {shape.name for shape in shapes.CPU}
    large = [one for one in plan if one[0] != goals.CPU_SMALL]
    assert plan[: baselines.COSTLY] == [("cpu-16k", "bf16", "index"), ("cpu-16k", "fp32", "index")]
    assert plan[: baselines.COMPILED] == large  # torch.compile beside all of them
    assert {dtype for name, dtype, _ in plan if name == goals.CPU_SMALL} == {"bf16", "fp32"}
    assert {("cpu-16k", dtype, "mask") for dtype in ("bf16", "fp32")} | {
        ("cpu-16k", "fp16", "index")
    } <= set(plan)


def test_the_workspace_of_a_cpu_is_swept_beside_its_peers(monkeypatch):
    asked, given = [], []

    def peak(*named):
        asked.append(named)
        return 3.0, 1.0

    def judged(peer, *rest):
        given.append(getattr(peer.build(), "keywords", {}).get("workspace"))
        return in_suite(peer, *rest)

    in_suite = suite.judged
    monkeypatch.setattr(suite, "judged", judged)
    monkeypatch.setattr(memory, "peak", peak)
    monkeypatch.setattr(
        suite,
        "staged",
        lambda device, steps, seconds: iter([{key: [2.0, 3.0] for key in steps}] * 2),
    )
    names = ["ours-torch", "eager"]
    lines = list(profiling.workspace(Cpu(), TINY, "fp32", names, [1, 64]))
    found = {(one["peer"], one.get("item")): one for one in lines}
    assert list(found) == [("ours-torch", 1), ("ours-torch", 64), ("eager", None), ("floor", None)]
    assert given == [1 << 20, 64 << 20, None]
    assert len({one["group"] for one in lines}) == 1
    assert all((one["over_floor"], one["median_ms"]) == (1.0, 2.5) for one in found.values())
    assert all(
        (one["peak_mib"], one["returned_mib"]) == (3.0, 1.0) for one in list(found.values())[:3]
    )
    assert asked == [("tiny", "fp32", name, "index", mib) for name, mib in list(found)[:3]]
    assert set(profiling.BESIDE["cpu"]) == {"eager", "compile"}


def test_the_peak_depends_on_the_workspace():
    if reason := resident.missing():
        pytest.skip(reason)
    (least, same), (most, returned) = (
        memory.peak("cpu-4k-encoder", "fp32", "ours-torch", "index", x) for x in (2, 64)
    )
    assert same == returned
    assert most - least > 8


def test_fp8_is_measured_where_the_device_has_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # stands for a GPU that runs Triton
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    missing, cuda = baselines.BY_NAME["ours-fp8"].missing, torch.device("cuda")
    capability = (8, 0)
    assert "sm_89" in missing(cuda, torch.bfloat16)
    capability = (9, 0)
    assert missing(cuda, torch.bfloat16) is None
    assert missing(cuda, torch.float32) is not None
    assert missing(torch.device("cpu"), torch.bfloat16) is not None


def test_what_a_promise_raises_is_its_outcome():
    assert guarantees.outcome(lambda: 1 / 0) == "ZeroDivisionError: division by zero"


def test_shapes_are_consistent():
    for shape in shapes.BY_NAME.values():
        assert 0 < shape.visual <= shape.tokens
    assert (shapes.CPU[0].rows, shapes.CPU[0].selected) == (16384, 12288)
    case = shapes.case(TINY, torch.float32, torch.device("cpu"), "mask")
    index = shapes.case(TINY, torch.float32, torch.device("cpu"), "index")
    assert case.rows.sum() == TINY.selected
    assert torch.equal(case.rows.reshape(-1).nonzero().squeeze(1), index.rows)
    assert case.upstream != 1
    with pytest.raises(ValueError, match="shape: got"):
        shapes.plan(torch.device("cpu"), ["nonsense"])


def test_what_ends_a_measurement_early_leaves_what_was_known(monkeypatch):
    names = ["floor", "eager", "ours-torch"]
    whole = list(suite.measure(TINY, "fp32", Cpu(), names, seconds=30, with_memory=False))
    assert [one["peer"] for one in whole] == ["eager", "ours-torch", *names, *names]
    assert all("median_ms" not in one and one["error_ratio"] > 0 for one in whole[:2])
    assert all(one["floor_ms"] == whole[2]["median_ms"] for one in whole[2:5])
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
    assert [one["median_ms"] for one in kept if "median_ms" in one] == [2.5] * 3


def test_a_shape_that_the_memory_cannot_hold_is_not_tried(monkeypatch):
    monkeypatch.setattr(Cpu, "free", lambda self: 1 << 30)
    assert suite.too_large(TINY, Cpu()) is None
    (line,) = suite.measure(shapes.BY_NAME["qwen25vl-72b"], "bf16", Cpu(), ["ours-blas"])
    assert line["unavailable"] == "judging it takes 8 GiB, of which 1 are free"
    (line,) = profiling.workspace(Cpu(), shapes.BY_NAME["qwen25vl-72b"], "bf16")
    assert line["unavailable"] == "judging it takes 8 GiB, of which 1 are free"
    monkeypatch.setattr(Cpu, "free", lambda self: 79 << 30)
    assert all(suite.too_large(shape, Cpu()) is None for shape in shapes.GPU)


def test_training_is_tried_where_it_fits(monkeypatch):
    class Card:
        total_memory = 80 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    assert training.lacks(Cuda(), training.LLAVA) == "needs a GPU of 100 GiB, this one has 80"
    Card.total_memory = 140 << 30
    assert training.lacks(Cuda(), training.LLAVA) is None
    assert training.lacks(Cpu(), training.TINY) is None
    assert training.lacks(Cpu(), training.DEFAULT["cpu"]) is None


def test_the_model_that_is_trained_on_a_cpu_is_smolvlm_256m():
    size = training.DEFAULT["cpu"]
    model = training.build(size, torch.device("meta"))
    text = sum(p.numel() for p in model.model.text_model.parameters())
    assert text == pytest.approx(135e6, rel=0.02)
    assert sum(p.numel() for p in model.parameters()) == 256_484_928
    assert all(p.dtype == torch.float32 for p in model.parameters())
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_model"}
    assert training.visual(size) == model.model.image_seq_len == 64
    inputs = training.batch(size, torch.device("cpu"))
    assert (inputs["input_ids"] == training.IMAGE).sum(1).tolist() == [64] * 6
    assert (inputs["labels"] >= 0).sum() == 6 * (96 - 64)


def smolvlm_of_a_few_layers():
    text, vision = training.TINY.text, {**training.TINY.vision}
    del vision["projection_dim"]
    return training.SMOLVLM._replace(batch=2, tokens=24, text=text, vision=vision, layer=2, scale=2)


@pytest.mark.parametrize(
    "size", [training.TINY, smolvlm_of_a_few_layers()], ids=lambda size: size.name
)
def test_a_training_step_of_every_class_of_models(size):
    step = training.Step(size, Cpu())
    seen = []
    for name, part in step.model.model.named_children():
        if name in training.FROZEN:
            part.register_forward_hook(
                lambda module, inputs, output: seen.append(output[0].requires_grad)
            )
    step()
    assert seen == [False]  # no backward goes through the frozen encoder
    held = step.held_mib()
    head = step.attach().head
    before = [p.detach().clone() for p in head.parameters()]
    step()
    assert step.handle.metrics()["pre_tokens"] == size.batch * training.visual(size)
    # in bfloat16 so small a rate leaves some as they were
    assert not all(torch.equal(p, old) for p, old in zip(head.parameters(), before, strict=True))
    own = (
        3 * sum(p.nbytes for p in head.parameters()) / 2**20
    )  # parameters and both moments; AdamW counts steps too
    assert step.held_mib() - held == pytest.approx(own, rel=1e-2)


def test_training_on_a_cpu_records_both_ratios(tmp_path, capsys):
    assert training.main(["--tiny", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    (file,) = tmp_path.iterdir()
    (line,) = records = record.load([file])
    assert line.keys() >= STAMP | {"with_ms", "without_ms", "samples"}
    assert (line["item"], line["n"]) == ("tiny", 32)
    assert 0 < line["time_ratio_q1"] <= line["time_ratio"] <= line["time_ratio_q3"]
    # the whole of the model is in it, and the head is taken off
    assert line["without_mib"] > training.Step(training.TINY, Cpu()).held_mib()
    assert line["memory_ratio"] == (line["with_mib"] - line["head_mib"]) / line["without_mib"]
    assert line["memory_ratio_with_head"] == line["with_mib"] / line["without_mib"]
    for name in ("time_ratio", "memory_ratio"):
        assert goals.field("training", name, records, item="tiny").value == line[name]
    assert (
        said.err.count(", with PRe") == said.err.count(", without PRe") == line["samples"] + 1
    )  # one to warm up
    assert "memory_ratio_with_head" in said.out


def test_what_the_processes_of_both_peaks_hold(capsys):
    held = {}
    for which in ("with", "without"):
        assert training.main(["--tiny", "--peak", which]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["rise_mib"] >= 0
        held[which] = told["held_mib"]
    assert held["with"] > held["without"]


def test_the_ratio_of_times_is_that_of_neighbours():
    """Medians of each alone would give 24 / 20."""
    found = training.pairs([11.0, 24.0, 90.0], [10.0, 20.0, 100.0])
    assert found == pytest.approx({"time_ratio": 1.1, "time_ratio_q1": 1.0, "time_ratio_q3": 1.15})


def test_tiles_that_cannot_be_tried(monkeypatch):
    tiles = {"device": Cpu(), "role": "project", "n": 80, "d": 60, "m": 96, "dtype": "bf16"}
    (line,) = tile_sweep.tiles(**tiles, kinds=["descriptor"])
    assert (
        line["unavailable"]
        == "rows of 60 and 96 elements are no multiples of 16 bytes, which descriptors want"
    )
    monkeypatch.setattr(tile_sweep, "unavailable", lambda device, dtype: "triton is not installed")
    (line,) = tile_sweep.tiles(**tiles)
    assert line["unavailable"] == "triton is not installed"


def test_the_sources_of_a_record_are_all_that_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    hashes = set()
    for folder in ("pre_kernels", "integrations"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(folder)
        hashes.add(record._source.__wrapped__())
    assert len(hashes) == 2
    asked = []
    monkeypatch.setattr(record, "_git", lambda *words: asked.append(words) or "text")
    assert record._commit.__wrapped__() == "text-dirty"
    assert {"pre_kernels", "integrations", "bench"} <= set(asked[-1])
