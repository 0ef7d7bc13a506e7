"""The oracle itself: gradcheck in float64, and values computed by hand."""

import itertools
import math

import pytest
import torch

from pre_kernels import reference
from verify import oracle
from verify.oracle import make

OPTIONS = list(
    itertools.product(reference.ROW_LOSSES, reference.ACTIVATIONS, ["mean", "sum", "none"])
)


@pytest.mark.parametrize(("loss", "activation", "reduction"), OPTIONS)
def test_gradcheck(loss, activation, reduction):
    case = make(
        1,
        leading=(2, 4),
        d=3,
        m=5,
        z=4,
        dtype=torch.float64,
        weight="leading",
        rows="index64",
        anchor="compact",
    )
    leaves = [case.tensors[name].requires_grad_() for name in oracle.LEAVES]

    def function(*values):
        tensors = {**case.tensors, **dict(zip(oracle.LEAVES, values, strict=True))}
        return reference.pre_loss(
            **tensors,
            rows=case.rows,
            loss=loss,
            activation=activation,
            reduction=reduction,
            **case.options,
        )

    assert torch.autograd.gradcheck(function, leaves)


def by_hand(hidden, anchor, loss):
    """Compute one row in plain Python, with W1 = W2 = identity and ReLU."""
    p = [max(x, 0.0) for x in hidden]
    if loss == "cosine":
        dot = sum(x * y for x, y in zip(p, anchor, strict=True))
        return -dot / math.hypot(*p) / math.hypot(*anchor)
    differences = [x - y for x, y in zip(p, anchor, strict=True)]
    if loss == "mse":
        return sum(x * x for x in differences) / len(p)
    return sum(0.5 * x * x if abs(x) < 1 else abs(x) - 0.5 for x in differences) / len(p)


@pytest.mark.parametrize("loss", reference.ROW_LOSSES)
def test_values_by_hand(loss):
    hidden, anchor = [[0.5, -2.0, 3.0], [1.0, 1.0, -1.0]], [[1.0, 0.5, -0.25], [2.0, -1.0, 0.0]]
    eye = torch.eye(3, dtype=torch.float64)
    tensors = (
        torch.tensor(hidden, dtype=torch.float64),
        torch.tensor(anchor, dtype=torch.float64),
        eye,
        None,
        eye,
        None,
    )
    rows = [by_hand(h, a, loss) for h, a in zip(hidden, anchor, strict=True)]
    weight = torch.tensor([0.25, 3.0], dtype=torch.float64)

    def call(**options):
        return reference.pre_loss(*tensors, loss=loss, activation="relu", **options)

    assert call(reduction="none").tolist() == pytest.approx(rows)
    assert call().item() == pytest.approx(sum(rows) / 2)
    assert call(rows=torch.tensor([1])).item() == pytest.approx(rows[1])
    assert call(rows=torch.tensor([1, 0]), reduction="none").tolist() == pytest.approx(rows[::-1])
    assert call(row_weight=weight).item() == pytest.approx((0.25 * rows[0] + 3 * rows[1]) / 3.25)
    assert call(row_weight=weight, normalizer=5).item() == pytest.approx(
        (0.25 * rows[0] + 3 * rows[1]) / 5
    )
    assert call(reduction="sum", rows=torch.tensor([True, False])).item() == pytest.approx(rows[0])
