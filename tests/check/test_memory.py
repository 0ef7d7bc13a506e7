"""The peak of a process, and the formula for it."""

import pytest
import torch

from pre_kernels import checks
from pre_kernels.check import cases, memory
from pre_kernels.fused import products, steps_torch


@pytest.mark.parametrize("impl", [*sorted(set(checks.IMPLEMENTATIONS) - {"auto", "torch"}), "fp8"])
def test_the_formula_of_the_peak_knows_each_implementation(impl):
    place = torch.device("cuda")
    for many in (False, True):
        shape = cases.Shape("tiny", 2, 2**20, 2**19 if many else 100, 128, 96, 64, "")
        dh = 2 * shape.visual * 128
        sums = 4 * 96 * (128 + 64)
        wanted = cases.workspace(impl, place, torch.bfloat16) + 2 * dh + many * sums
        assert cases.formula(shape, torch.bfloat16, impl, place) == wanted
        if impl != "fp8":
            assert cases.formula(shape, torch.float32, impl, place) == wanted + 2 * dh - many * sums


@pytest.mark.parametrize("units", [None, "AMX"])
def test_the_formula_of_torch_on_a_cpu(monkeypatch, units):
    """dH is part of the returned gradients. float32 products need copies of half-precision weights,
    and sums of gradients."""
    monkeypatch.setattr(products, "HALF_UNITS", units)
    place = torch.device("cpu")
    few, some, many = (cases.Shape("tiny", 2, 2**17, n, 128, 96, 64, "") for n in (50, 500, 2**16))
    row = 128 + 2 * 96 + 64
    weights = 4 * 96 * (128 + 64)
    passes = 3 * steps_torch.IN_CACHE
    size, more = (2, 0) if units else (4, 2 * weights)
    assert cases.formula(few, torch.bfloat16, "torch", place) == 100 * row * size + more + passes
    assert cases.formula(few, torch.float32, "torch", place) == 100 * row * 4 + passes
    assert (
        cases.formula(few, torch.float16, "torch", place)
        == 100 * row * 4 + 2 * weights + 2**18 * 128 * 4 + passes
    )
    assert cases.formula(some, torch.float32, "torch", place) == 500 * row * 4 + passes
    chunk = -(-(2**17) // 7)  # Chunks of up to 32 MiB are equal parts.
    assert cases.formula(many, torch.float32, "torch", place) == chunk * row * 4 + passes
    if units:
        assert cases.formula(many, torch.bfloat16, "torch", place) == 2**17 * row * 2 + passes


@pytest.mark.skipif(
    memory.missing() is not None, reason="the peak of a process can be reset on Linux only"
)
def test_peak_of_the_process():
    torch.ones(1 << 20, dtype=torch.uint8)
    before = memory._resident("VmRSS")
    memory.RESET.write_text("5")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert 62 < memory._resident("VmHWM") - before < 70
