"""The checks of one implementation report right results and wrong ones."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from pre_kernels import fused_pre_loss, loss, reference
from pre_kernels.check import guarantees, implementation, memory
from pre_kernels.check.device import Cpu, Cuda


class StandIn(Cuda):
    """A stand-in for a GPU, whose tensors are on the CPU."""

    torch_device = torch.device("cpu")
    room = 1 << 40

    def synchronize(self):
        pass

    def sample(self, step):
        return Cpu().sample(step)

    def peak(self, step):
        return 2.0, sum(x.nbytes for x in step()) / 2**20

    def free(self):
        return self.room

    def enqueue_us(self, step):
        return 700.0

    @contextmanager
    def syncs_forbidden(self):
        yield


def captured(step):
    """A stand-in for a CUDA graph."""
    got = step()
    return lambda: [kept.copy_(new) for kept, new in zip(got, step(), strict=True)], got


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.setattr(implementation, "current", StandIn)
    monkeypatch.setattr(implementation, "SECONDS", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(guarantees, "captured", captured)
    # The true function takes seconds; test_guarantees.py tests it.
    monkeypatch.setattr(guarantees, "fullgraph", lambda *arguments: guarantees.NO_BREAK)
    return implementation.Checks("torch", 64, 64, "fp32")


def told(checks, wait=lambda: True):
    lines = []
    implementation.report(checks, lines.append, wait)
    return {line["check"]: line for line in lines if "check" in line}, lines


def test_every_check_of_a_gpu(checks):
    results, lines = told(checks)
    assert list(results) == list(implementation.NAMES)
    outcomes = {name: line["outcome"] for name, line in results.items()}
    assert outcomes == dict.fromkeys(implementation.NAMES, "pass") | {"time": "info"}
    assert lines[8] == {"ready": True}  # Four checks with two lines each come first.
    assert lines[-1] == {"done": True}
    assert results["CUDA graph, other rows"]["says"] == "integer rows"
    assert "queued by the host in 0.70 ms" in results["time"]["says"]
    assert results["time"]["values"]["floor"]["median_ms"] > 0
    ratio = results["peak memory"]["values"]["ratio"]
    assert results["peak memory"]["says"].startswith(f"{ratio:.2f} × the formula: 2 of ")


def test_masks_are_among_the_calls_of_the_others(monkeypatch):
    assert list(implementation.Checks("blas", 64, 64, "bf16").calls()) == [
        "integer rows",
        "mask",
        "mask and weights",
    ]


def test_wrong_results_are_not_timed(checks):
    checks.function = lambda **arguments: 1.01 * reference.pre_loss(**arguments)
    results, _ = told(checks)
    for name in ("error, small case", "error, real size"):
        assert results[name]["outcome"] == "fail"
        assert "error" in results[name]["says"]
    assert results["error, small case"]["says"].startswith("mask: ")
    assert results["time"]["outcome"] == "skip"
    assert results["peak memory"]["outcome"] == "pass"


@pytest.mark.parametrize(
    ("off", "outcome"), [(1.02, "pass"), (1.2, "fail"), (float("nan"), "fail")]
)
def test_float8_has_a_gate_of_its_own(checks, off, outcome):
    checks.impl = "fp8"
    checks.function = lambda **arguments: off * reference.pre_loss(**arguments)
    results, _ = told(checks, wait=lambda: False)
    assert results["error, small case"]["outcome"] == outcome
    assert ("0.20 × a relative rms error of 0.1" in results["error, small case"]["says"]) == (
        outcome == "pass"
    )


def test_what_is_raised_names_the_call_and_keeps_its_traceback(checks):
    def refuses(**arguments):
        raise ZeroDivisionError("no such rows")

    checks.function = refuses
    results, lines = told(checks)
    line = results["no host sync"]
    assert line["outcome"] == "fail"
    assert line["says"] == "RuntimeError: integer rows: ZeroDivisionError: no such rows"
    assert "in refuses" in line["traceback"]
    assert results["error, small case"]["says"] == "ZeroDivisionError: no such rows"
    assert lines[-1] == {"done": True}


def test_a_graph_and_a_break_that_are_not_as_guaranteed(checks, monkeypatch):
    monkeypatch.setattr(
        guarantees, "captured", lambda step: (lambda: None, tuple(2 * x for x in step()))
    )
    monkeypatch.setattr(
        guarantees, "fullgraph", lambda *arguments: "no break, but its gradients differ"
    )
    results, _ = told(checks, wait=lambda: False)
    assert results["CUDA graph, other rows"]["outcome"] == "fail"
    assert (
        results["CUDA graph, other rows"]["says"]
        == "integer rows: captured, but its gradients differ"
    )
    assert results["torch.compile, fullgraph"]["outcome"] == "fail"


def test_a_peak_above_the_formula(checks):
    checks.device.peak = lambda step: (1e6, 1.0)
    found = checks.peak()
    assert found.outcome == "fail"
    assert found.values["ratio"] > 1


def test_a_lost_device_ends_the_checks(checks):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    checks.device.synchronize = lost
    results, lines = told(checks)
    (line,) = results.values()
    assert line["outcome"] == "fail"
    assert "illegal memory access" in line["says"]
    assert "illegal memory access" in line["traceback"]
    assert lines[-1] == {"done": True}


def test_nobody_listens(checks):
    results, lines = told(checks, wait=lambda: "")
    assert list(results) == list(implementation.NAMES[:4])
    assert lines[-1] == {"ready": True}


@pytest.mark.usefixtures("checks")
def test_what_does_not_fit_is_left_out_and_the_rest_measured():
    checks = implementation.Checks("torch", 64, 1024, "fp32")
    large = (
        implementation.needed(
            checks.real,
            torch.float64,
            implementation.workspace("torch", torch.device("cpu"), torch.float64),
        )
        + implementation.FLUSH
    )
    checks.device.room = large - 1
    results, _ = told(checks)
    assert results["error, small case"]["outcome"] == "pass"
    assert results["error, real size"]["outcome"] == "skip"
    want = (
        f"1024 rows of width 64 take {large / 2**30:.1f} GiB, of which {large / 2**30:.1f} are free"
    )
    assert results["error, real size"]["says"].startswith(want)
    assert results["peak memory"]["outcome"] == "pass"
    assert results["time"]["outcome"] == "info"
    checks.device.room = 1000  # Not even the small checks fit.
    results, _ = told(checks)
    assert [line["outcome"] for line in results.values()] == ["skip"] * len(implementation.NAMES)
    assert all("are free; want a smaller --width" in line["says"] for line in results.values())


@pytest.mark.skipif(
    memory.missing() is not None, reason="the peak of a process can be reset on Linux only"
)
def test_the_room_that_is_asked_for_is_enough_and_not_much_more():
    code = """if True:
        import torch
        from pre_kernels.check import memory, implementation
        shape = implementation.Checks("torch", 512, 2048, "fp32").real
        call = implementation.case(shape, torch.float32, torch.device("cpu"))
        rise, _ = memory.second(lambda: implementation.Judge(call))
        print(rise + sum(x.nbytes for x in call.tensors.values()) / 2**20)
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    shape = implementation.Checks("torch", 512, 2048, "fp32").real
    estimate = implementation.needed(shape, torch.float64, 0) / 2**20
    assert 0.6 * estimate < float(done.stdout) < estimate


@pytest.mark.skipif(not loss.HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    ("impl", "dtype", "width", "reason"),
    [
        ("torch", "fp32", 9008, None),
        ("blas", "fp16", 9008, None),
        ("triton", "fp32", 64, None),
        ("fp8", "bf16", 8192, None),
        ("fp8", "bf16", 8208, "--width: got 8208, want at most 8192"),
        ("fp8", "fp16", 64, "float8 products need --dtype bf16"),
    ],
)
def test_what_runs_on_a_gpu(monkeypatch, impl, dtype, width, reason):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert (
        implementation.unfit(impl, torch.device("cuda"), implementation.DTYPES[dtype], width)
        == reason
    )


def test_what_runs_on_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    where = (torch.device("cpu"), torch.float32, 64)
    assert implementation.unfit("torch", *where) is None
    assert "not on a GPU" in implementation.unfit("blas", *where)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert implementation.unfit("triton", *where) is None
    assert "need a GPU" in implementation.unfit("fp8", *where)
    monkeypatch.setattr(loss, "HAS_TRITON", False)
    assert implementation.unfit("triton", *where) == "triton is not installed"


def test_an_implementation_is_what_its_name_says():
    assert implementation.Checks("fp8", 64, 64, "bf16").function.keywords == {
        "impl": "blas",
        "precision": "fp8",
    }
    assert implementation.Checks("triton", 64, 64, "bf16").function.keywords == {"impl": "triton"}
    assert implementation.Checks("torch", 64, 64, "bf16").function.func is fused_pre_loss
