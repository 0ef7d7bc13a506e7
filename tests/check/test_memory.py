"""The peak of a process, and the formula that it is held against."""

import pytest
import torch

from pre_kernels import checks
from pre_kernels.check import cases, memory


@pytest.mark.parametrize("impl", [*sorted(set(checks.IMPLEMENTATIONS) - {"auto"}), "fp8"])
def test_the_formula_of_the_peak_knows_each_implementation(impl):
    place = torch.device("cuda")
    for many in (False, True):
        shape = cases.Shape("tiny", 2, 2**20, 2**19 if many else 100, 128, 96, 64, "")
        dh, sums = 2 * shape.visual * 128, 4 * 96 * (128 + 64)
        wanted = cases.workspace(impl, place) + 2 * dh + many * sums
        assert cases.formula(shape, torch.bfloat16, impl, place) == wanted
        if impl != "fp8":
            assert cases.formula(shape, torch.float32, impl, place) == wanted + 2 * dh - many * sums


@pytest.mark.skipif(memory.missing() is not None, reason="the peak of a process can be reset on Linux alone")
def test_peak_of_the_process():
    torch.ones(1 << 20, dtype=torch.uint8)
    before = memory._resident("VmRSS")
    memory.RESET.write_text("5")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert 62 < memory._resident("VmHWM") - before < 70
