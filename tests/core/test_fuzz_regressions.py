"""Cases that fuzzing found to be outside the rule, kept after the repair; and the judge of such
cases."""

import dataclasses

import pytest
import torch

from pre_kernels import fused_pre_loss
from verify import oracle
from verify.fuzz.specs import Spec, build
from verify.fuzz.verdicts import LUCK, OVERFLOW, VIOLATION, WITHIN, Ensemble, run

FOUND = {
    # The last chunk had 3 rows, whose products the vendor adds up in another order than those of
    # 67.
    "a few rows left for the last chunk": Spec(
        seed=132492194,
        dtype="float64",
        leading=(67,),
        d=37,
        m=37,
        z=64,
        loss="mse",
        reduction="none",
        normalizer_tensor=True,
        bias=(False, True),
        rows="index64",
        pattern="all",
        anchor_compact=True,
        anchor_dtype="float64",
        scale=2,
        scale_anchor=2,
        zero_rows=True,
        upstream=0.37,
        workspace=20_000,
    ),
    # The products of chunks were rounded to float16, and overflowed where their sum does not.
    "float16 sums of chunks": Spec(
        seed=4096,
        dtype="float16",
        leading=(67,),
        d=64,
        m=64,
        z=37,
        activation="silu",
        normalizer=1e-3,
        anchor_dtype="float64",
        weight="leading",
        scale=1,
        scale_w2=-3,
        scale_anchor=-4,
        layout="expanded",
        upstream=0.37,
        workspace=1,
    ),
    # Products with hidden states that are transposed in memory had twice the error.
    "transposed hidden states": Spec(
        seed=11326,
        leading=(1, 131),
        d=37,
        m=1,
        z=64,
        loss="smooth_l1",
        activation="relu",
        reduction="sum",
        bias=(False, True),
        pattern="all",
        anchor="parallel",
        noise=1e-7,
        scale=-2,
        scale_w2=4,
        scale_anchor=3,
        outliers="channels",
        layout="transposed",
        upstream=-3.0,
    ),
    # dG overflowed where relu's derivative is 0, and their product was nan.
    "relu of an overflow": Spec(
        impl="triton",
        seed=5523,
        dtype="float16",
        leading=(13, 1),
        d=7,
        m=2,
        z=2,
        activation="relu",
        reduction="none",
        bias=(False, False),
        pattern="all",
        anchor_dtype="bfloat16",
        weight="leading",
        scale=-2,
        scale_w2=2,
        scale_anchor=1,
        outliers="channels",
        zero_rows=True,
        layout="transposed",
        upstream=0.37,
    ),
    # When the scale was folded into w1, its gradient underflowed.
    "the scale of a norm in float16": Spec(
        seed=709523,
        dtype="float16",
        leading=(1, 1),
        d=5,
        m=3,
        z=16,
        depth=1,
        norm="layer",
        activation="silu",
        reduction="none",
        rows="index64",
        anchor_compact=True,
        scale=-3,
        scale_w2=1,
        scale_anchor=1,
        layout="transposed",
        upstream=0.001,
        workspace=1,
    ),
    # Scale and shift were folded into w1 and b1, which rounds them alike in every row.
    "the shift of a norm in front of one layer": Spec(
        seed=716332,
        leading=(3, 3, 3),
        d=127,
        m=7,
        z=7,
        depth=1,
        norm="layer",
        loss="mse",
        activation="silu",
        reduction="none",
        pattern="all",
        anchor_dtype="float16",
        scale=1,
        scale_w2=1,
        layout="strided",
    ),
    # The layer norm was less exact than PyTorch's own.
    "a layer norm in front of predictions opposite to the anchors": Spec(
        seed=134,
        autocast="bfloat16",
        leading=(67,),
        m=7,
        z=5,
        norm="layer",
        activation="silu",
        reduction="sum",
        normalizer_tensor=True,
        pattern="all",
        anchor_compact=True,
        anchor_dtype="float16",
        anchor="opposite",
        noise=1e-07,
        weight="compact",
        scale_w2=-1,
        scale_anchor=-3,
        outliers="channels",
        layout="expanded",
        upstream=0.001,
        frozen=("b3",),
        units="AMX",
    ),
    # Similar rows were rounded alike in float32, and the rounding added up.
    "aligned rows": Spec(
        seed=710562,
        leading=(5, 13, 3),
        d=7,
        m=7,
        z=37,
        activation="relu",
        reduction="sum",
        pattern="all",
        anchor_compact=True,
        anchor="parallel",
        scale=-3,
        scale_anchor=-1,
        outliers="channels",
        zero_rows=True,
        layout="strided",
        upstream=0.001,
    ),
}

# eager's db1 is infinite, while that of float64 and ours are not.
EAGER_OVERFLOWS = Spec(
    seed=1,
    autocast="float16",
    leading=(5, 7),
    d=5,
    m=16,
    z=16,
    loss="smooth_l1",
    normalizer=1e-3,
    rows="mask",
    pattern="all",
    weight="compact",
    scale=2,
    scale_w2=2,
    scale_anchor=3,
    layout="expanded",
    upstream=0.37,
)
# The same holds for db2, where some elements overflow in both.
BOTH_OVERFLOW = Spec(
    seed=1,
    autocast="float16",
    leading=(13, 13),
    m=3,
    z=7,
    loss="mse",
    activation="silu",
    reduction="none",
    rows="index64",
    anchor_compact=True,
    anchor_dtype="bfloat16",
    anchor="parallel",
    noise=1e-7,
    scale=1,
    scale_w2=3,
    scale_anchor=3,
    outliers="channels",
    zero_rows=True,
)
# The rows are alike, and eager's error in dW2 is small by chance.
EAGER_IS_LUCKY = Spec(
    leading=(131, 3),
    d=1,
    m=3,
    loss="mse",
    bias=(False, False),
    pattern="all",
    scale_anchor=3,
    layout="expanded",
)

# Every derivative is a row's weight, so there are as few roundings as rows.
ROWS_ARE_FEW = Spec(
    seed=19851259,
    dtype="bfloat16",
    leading=(2, 7, 13),
    d=2,
    m=16,
    z=16,
    loss="smooth_l1",
    activation="silu",
    bias=(False, True),
    rows="index32",
    pattern="runs",
    anchor_compact=True,
    anchor_dtype="float64",
    anchor="parallel",
    noise=1e-7,
    weight="compact",
    scale=-3,
    scale_w2=1,
    scale_anchor=2,
    outliers="channels",
    zero_rows=True,
    workspace=1,
)

# A row's derivative is infinite in eager, and just not infinite in ours.
OVERFLOWS_BY_A_HAIR = Spec(
    seed=30913,
    autocast="float16",
    leading=(3, 2),
    d=37,
    m=64,
    z=31,
    normalizer=0.001,
    rows="index32",
    anchor_dtype="float32",
    anchor="opposite",
    noise=0.01,
    scale=1,
    scale_w2=-4,
    scale_anchor=-4,
    outliers="channels",
    layout="expanded",
    upstream=1024.0,
)
# Derivatives are constants here, so every row has the same rounding, in ours or in eager's.
CONSTANT_SLOPES = Spec(
    dtype="float64",
    leading=(67, 2, 2),
    d=1,
    m=7,
    loss="smooth_l1",
    activation="relu",
    bias=(False, False),
    rows="index32",
    pattern="all",
    anchor_compact=True,
    outliers="channels",
    layout="expanded",
)


@pytest.mark.parametrize("spec", FOUND.values(), ids=FOUND.keys())
def test_found_by_fuzzing(spec, device):
    assert not [one for one in run(spec, device) if one.verdict == VIOLATION]


@pytest.mark.parametrize(
    ("spec", "tensor", "verdict"),
    [
        (EAGER_OVERFLOWS, "b1", WITHIN),
        (BOTH_OVERFLOW, "b2", WITHIN),
        (EAGER_IS_LUCKY, "w2", LUCK),
        (ROWS_ARE_FEW, "w2", LUCK),
        (OVERFLOWS_BY_A_HAIR, "b2", OVERFLOW),
        (CONSTANT_SLOPES, "w2", LUCK),
    ],
)
def test_where_eager_is_no_measure(spec, tensor, verdict):
    if verdict == OVERFLOW:
        # On a CPU "torch" has float32 products, which do not overflow.
        spec = dataclasses.replace(spec, impl="triton")
    found = {one.name: one.verdict for one in run(spec)}
    # The processor decides whose noise is larger.
    assert found.pop(tensor) in ((verdict, WITHIN) if verdict == LUCK else (verdict,))
    assert set(found.values()) == {WITHIN}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("what", ["sum", "infinite"])
def test_what_is_worse_than_eager_is_a_violation(monkeypatch, what, dtype):
    """It is one in every ensemble too: the noise of neighbours is not an excuse."""
    from pre_kernels.fused import products

    real = products.add_product

    def worse(total, dy, x, first, copies=False):
        done = real(total, dy, x, first, copies)
        noise = torch.randn(total.shape, generator=torch.Generator().manual_seed(0))
        if what == "sum":
            total.add_(total * noise.to(total.dtype) * (5 * torch.finfo(getattr(torch, dtype)).eps))
        else:
            total[0, 0] = torch.inf
        return done

    monkeypatch.setattr("pre_kernels.fused.steps_torch.add_product", worse)
    # An error this large shows in few neighbours.
    monkeypatch.setattr("verify.fuzz.verdicts.ENSEMBLES", (32,))
    spec = Spec(dtype=dtype, leading=(40,), d=16, m=16, z=16)
    verdicts = {outcome.name: outcome.verdict for outcome in run(spec)}
    assert {name for name, verdict in verdicts.items() if verdict == VIOLATION} == {"w1", "w2"}


def test_a_case_is_the_same_every_time_and_its_neighbours_are_not():
    spec = Spec(leading=(5, 3), outliers="tokens", zero_rows=True, rows="index64", weight="compact")
    case, again = build(spec)[0], build(spec)[0]
    assert all(torch.equal(x, again.tensors[name]) for name, x in case.tensors.items())
    ensemble = Ensemble(
        lambda **arguments: sum(arguments[name].sum() for name in oracle.LEAVES), case
    )
    values = [ensemble.member(i)["loss"].ours for i in range(3)]
    assert len(set(map(float, values))) == 3


def test_an_error_of_the_case_alone_is_no_luck(monkeypatch):
    """An error in the case itself is a violation, however right its neighbours are."""
    monkeypatch.setattr("verify.fuzz.verdicts.ENSEMBLES", (32,))
    case = build(Spec(leading=(40,), d=16, m=16, z=16))[0]
    calls = []

    def function(**arguments):
        calls.append(1)
        return fused_pre_loss(**arguments) * (1.001 if calls == wrong else 1.0)

    wrong = [0]
    assert Ensemble(function, case).holds("w1")
    calls.clear()
    wrong = [1]
    assert not Ensemble(function, case).holds("w1")
