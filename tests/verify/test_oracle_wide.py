"""The long doubles' oracle against mpmath, and against the equations in float64."""

import mpmath
import numpy as np
import pytest
import torch

from pre_kernels import reference
from pre_kernels.checks import ACTIVATIONS, LOSSES, REDUCTIONS
from verify import oracle
from verify.oracle import make

wide = pytest.importorskip("verify.oracle_wide")
if not wide.AVAILABLE:
    pytest.skip("this machine has no floats wider than 64 bits", allow_module_level=True)


def test_erfc():
    x = np.linspace(-7, 25, 400)
    with mpmath.workdps(40):
        for argument, value in zip(x, wide.erfc(x.astype(np.longdouble)), strict=True):
            high = float(value)
            error = (
                mpmath.mpf(high)
                + mpmath.mpf(float(value - high))
                - mpmath.erfc(mpmath.mpf(float(argument)))
            )
            # The exponential of x² inherits the rounding of x².
            assert abs(error) < 1e-18 * (2 + argument**2) * mpmath.erfc(float(argument)), argument


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_agrees_with_the_equations(loss, activation, reduction):
    case = make(
        3,
        dtype=torch.float64,
        loss=loss,
        activation=activation,
        reduction=reduction,
        weight="leading",
        upstream=-3.0,
    )
    pairs, want = wide.run(case), oracle.run(reference.pre_loss, case)
    assert set(pairs) == set(want)
    for name, (high, low) in pairs.items():
        torch.testing.assert_close(high, want[name], rtol=1e-12, atol=1e-13)
        assert 0 < low.abs().max() < 1e-15 * high.abs().max()


@pytest.mark.parametrize("rows", ["mask", "index32", "index64", "all"])
@pytest.mark.parametrize("anchor", ["leading", "compact"])
@pytest.mark.parametrize("weight", ["leading", "compact", None])
@pytest.mark.parametrize("normalizer", [None, 37.5])
def test_reads_the_arguments_alike(rows, anchor, weight, normalizer):
    case = make(
        4,
        dtype=torch.float64,
        rows=rows,
        anchor=anchor,
        weight=weight,
        normalizer=normalizer,
        frozen=("w1",),
    )
    pairs, want = wide.run(case), oracle.run(reference.pre_loss, case)
    assert set(pairs) == set(want)
    for name, (high, _) in pairs.items():
        torch.testing.assert_close(high, want[name], rtol=1e-12, atol=1e-13)
