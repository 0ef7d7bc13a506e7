"""Loss and gradients do not depend on how the rows are split into chunks, nor on the other rows of
the batch."""

import pytest
import torch

from pre_kernels import checks, fused_pre_loss
from verify import oracle
from verify.oracle import make, run

from ..slow import thinned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPE = {"d": 64, "m": 96, "z": 64, "leading": (450,), "selected": 0.8}
# A workspace of 1 gives the smallest chunks, of 64 or 128 rows; the other gives a single chunk.
WORKSPACES = (1, 1 << 30)


def function(impl, **options):
    return lambda **arguments: fused_pre_loss(**arguments, impl=impl, **options)


@pytest.mark.parametrize("loss", checks.LOSSES)
@pytest.mark.parametrize("dtype", thinned(DTYPES, 2))
def test_chunks(impl, device, loss, dtype):
    """Both hold the error rule. In half precision they differ by one rounding at most; in float32
    sums of 450 rows in another order may differ more."""
    case = make(4, dtype=dtype, device=device, loss=loss, weight="leading", upstream=0.37, **SHAPE)
    many, one = (
        oracle.compare(function(impl, workspace=workspace), case) for workspace in WORKSPACES
    )
    eps = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)
    for name, value in one.items():
        difference = (many[name].double() - value.double()).norm()
        assert difference <= eps * value.double().norm(), name


@pytest.mark.parametrize("workspace", thinned(WORKSPACES, 2))
@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("dtype", thinned(DTYPES, 2))
def test_other_rows(impl, device, dtype, precision, workspace, request):
    """Whatever other rows hold, the bits of a row's loss and of its gradient stay."""
    if precision and (impl, dtype) != ("blas", torch.bfloat16):
        pytest.skip("float8 is there for blas and bfloat16")
    if precision:
        request.getfixturevalue("row_scales")
    case = make(3, dtype=dtype, device=device, rows="all", reduction="none", **SHAPE)
    watched = torch.arange(0, 450, 7, device=device)
    others = torch.ones(450, dtype=torch.bool, device=device)
    others[watched] = False
    outputs = []
    for change in ("nothing", "huge", "not finite"):
        if change == "huge":
            case.tensors["hidden"][others] *= -100
            case.tensors["anchor"][others] *= -100
        if change == "not finite":
            case.tensors["hidden"][others] = float("nan")
            case.tensors["anchor"][others] = float("inf")
        result = run(function(impl, workspace=workspace, precision=precision), case)
        outputs.append((result["loss"][watched], result["hidden"][watched]))
        assert result["loss"].isfinite().all() == (change != "not finite")
    for losses, grads in outputs[1:]:
        assert torch.equal(losses, outputs[0][0])
        assert torch.equal(grads, outputs[0][1])


@pytest.mark.parametrize("dtype", thinned(DTYPES, 2))
def test_fewer_rows(impl, device, dtype):
    """The same rows by themselves give results within rounding, because matmuls of fewer rows may
    add up in another order."""
    case = make(3, dtype=dtype, device=device, rows="index64", reduction="none", **SHAPE)
    whole = run(function(impl), case)
    upstream = oracle.ramp(len(case.rows))
    case.rows = case.rows[:9]
    few = run(function(impl), case)
    ratio = (oracle.ramp(9) / upstream[:9]).to(device)
    eps = torch.finfo(dtype).eps
    for i, row in enumerate(case.rows.tolist()):
        assert (few["loss"][i] - whole["loss"][i]).abs() <= 4 * eps
        wanted = ratio[i] * whole["hidden"][row].double()
        assert (few["hidden"][row].double() - wanted).norm() <= 4 * eps * wanted.norm()
