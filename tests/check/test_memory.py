"""The peak of a process, and the formula that it is held against."""

import pytest
import torch

from pre_kernels import checks
from pre_kernels.check import cases, memory


@pytest.mark.parametrize("impl", sorted(set(checks.IMPLEMENTATIONS) - {"auto"}))
def test_the_formula_of_the_peak_knows_each_implementation(impl):
    assert cases.workspace(impl, torch.device("cuda")) >= 1 << 20
    shape = cases.Shape("tiny", 2, 160, 100, 128, 96, 64, "")
    assert cases.formula(shape, torch.bfloat16, 100) == 4 * 96 * (128 + 64) + 200 * 128 * 2 + 100


@pytest.mark.skipif(memory.missing() is not None, reason="the peak of a process can be reset on Linux alone")
def test_peak_of_the_process():
    torch.ones(1 << 20, dtype=torch.uint8)
    before = memory._resident("VmRSS")
    memory.RESET.write_text("5")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert 62 < memory._resident("VmHWM") - before < 70
