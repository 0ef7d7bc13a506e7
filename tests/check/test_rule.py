"""The judge of the error rule by itself."""

import pytest
import torch

from pre_kernels.check import rule


@pytest.mark.parametrize(("value", "holds"), [(2.0, True), (2.1, False), (float("inf"), True), (float("nan"), True)])
def test_finite_where_eager_overflowed_is_right_or_wrong(value, holds):
    eager, oracle = torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 2.0], dtype=torch.float64)
    one = rule.Comparison("w1", torch.tensor([1.0, value]), eager, oracle, 2**-11, 1.0)
    if holds:
        rule.judge(one)
    else:
        with pytest.raises(AssertionError, match="finite where eager is not"):
            rule.judge(one)
