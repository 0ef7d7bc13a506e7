"""The judge of the error rule by itself."""

import pytest
import torch

from pre_kernels.check import rule


@pytest.mark.parametrize(
    ("value", "holds"), [(2.0, True), (2.1, False), (float("inf"), True), (float("nan"), True)]
)
def test_finite_where_eager_overflowed_is_right_or_wrong(value, holds):
    eager, oracle = torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 2.0], dtype=torch.float64)
    one = rule.Comparison("w1", torch.tensor([1.0, value]), eager, oracle, 2**-11, 1.0)
    if holds:
        rule.judge(one)
    else:
        with pytest.raises(AssertionError, match="finite where eager is not"):
            rule.judge(one)


@pytest.mark.parametrize(
    ("exact", "value", "holds"), [(-65734.8, "-inf", True), (65734.8, "-inf", False)]
)
def test_an_infinity_that_float64_rounds_to_is_right(exact, value, holds):
    """This holds although eager's error left the value finite."""
    ours, eager = torch.tensor([1.0, float(value)]).half(), torch.tensor([1.0, -65088.0]).half()
    one = rule.Comparison(
        "w2", ours, eager, torch.tensor([1.0, exact], dtype=torch.float64), 2**-11, 1.0
    )
    if holds:
        assert rule.judge(one) == 0
    else:
        with pytest.raises(AssertionError, match="not finite where eager is"):
            rule.judge(one)


def test_an_infinity_within_the_range_is_wrong():
    ours, eager = torch.tensor([1.0, float("inf")]).half(), torch.tensor([1.0, 65088.0]).half()
    one = rule.Comparison(
        "w2", ours, eager, torch.tensor([1.0, 65300.0], dtype=torch.float64), 2**-11, 1.0
    )
    with pytest.raises(AssertionError, match="not finite where eager is"):
        rule.judge(one)
