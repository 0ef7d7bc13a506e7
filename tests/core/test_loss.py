"""Each implementation of `fused_pre_loss` against the float64 oracle."""

import itertools
import random

import pytest
import torch

from pre_kernels import fused_pre_loss, reference
from pre_kernels.checks import ACTIVATIONS, LOSSES
from pre_kernels.fused import products, steps_torch
from verify import oracle
from verify.oracle import make, run

from ..slow import thinned
from .support import judge, ours

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_case(seed: int, device) -> oracle.Case:
    pick = random.Random(seed)
    leading = pick.choice([(1,), (67,), (2, 33), (3, 2, 13), (5, 40)])
    rows = pick.choice(["mask", "mask", "index32", "index64", "all"])
    dtype = pick.choice(DTYPES)
    options = {
        "loss": pick.choice(LOSSES),
        "activation": pick.choice(ACTIVATIONS),
        "reduction": pick.choice(["mean", "mean", "sum", "none"]),
    }
    if options["reduction"] == "mean" and pick.random() < 0.3:
        options["normalizer"] = pick.choice([37.5, 12, torch.tensor(11.0, device=device)])
    # The cosine of a single number is a sign, which rounding flips in eager's or in ours.
    z = pick.choice([37, 128, 16, 1 if options["loss"] != "cosine" else 5])
    autocast = None
    if dtype == torch.float32 and pick.random() < 0.3:
        autocast = pick.choice(oracle.HALF)
    return make(
        seed,
        leading=leading,
        d=pick.choice([1, 16, 32, 123]),
        m=pick.choice([1, 8, 48, 130]),
        z=z,
        dtype=dtype,
        device=device,
        rows=rows,
        anchor=pick.choice(["leading", "compact"]),
        weight=pick.choice([None, None, "leading", "compact"]),
        bias=(pick.random() < 0.7, pick.random() < 0.7),
        contiguous=pick.random() < 0.7,
        frozen=tuple(name for name in oracle.LEAVES if pick.random() < 0.2),
        upstream=pick.choice([1.0, -3.0, 0.37]),
        selected=pick.choice([0.0, 0.3, 0.7, 1.0]),
        autocast=autocast,
        workspace=pick.choice([None, 1, 20_000]),
        **options,
    )


@pytest.mark.parametrize("seed", thinned(range(120), 4))
def test_random_options(impl, device, seed, monkeypatch):
    monkeypatch.setattr(products, "HALF_UNITS", "AMX" if seed % 2 else None)
    judge(impl, random_case(seed, device))


@pytest.mark.parametrize("units", [None, "AMX"])
@pytest.mark.parametrize("rows", ["mask", "all"])
@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_both_kinds_of_half_precision_products_of_a_cpu(monkeypatch, units, rows, workspace, loss):
    """Both run, whatever this CPU has. Predictions are narrower or wider than dH, in whose memory
    those of a single chunk may lie."""
    monkeypatch.setattr(products, "HALF_UNITS", units)
    for dtype, autocast in (
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
    ):
        for z in (37, 300):
            options = {
                "rows": rows,
                "dtype": dtype,
                "autocast": autocast,
                "z": z,
                "workspace": workspace,
            }
            judge(
                "torch",
                make(20, leading=(3, 100), loss=loss, weight="leading", upstream=0.37, **options),
            )


@pytest.mark.parametrize(
    ("loss", "activation", "dtype"), list(itertools.product(LOSSES, ACTIVATIONS, DTYPES))
)
def test_every_loss_activation_and_dtype(impl, device, loss, activation, dtype):
    judge(
        impl,
        make(7, dtype=dtype, device=device, loss=loss, activation=activation, m=130, upstream=2.5),
    )


@pytest.mark.parametrize(("m", "z"), [(3, 1500), (1500, 3)])
def test_a_width_much_larger_than_the_other(impl, device, m, z):
    """Wide rows are shared by more programs, each with its own sums. A cosine of three numbers
    would be judged by luck, because eager's own error is luck there."""
    judge(impl, make(16, device=device, m=m, z=z, loss="mse"))


@pytest.mark.parametrize("frozen", thinned(itertools.product([False, True], repeat=5), 3))
def test_frozen_inputs_in_every_combination(impl, device, frozen):
    names = tuple(name for name, is_frozen in zip(oracle.LEAVES, frozen, strict=True) if is_frozen)
    for reduction in ("mean", "none"):
        judge(impl, make(3, leading=(2, 20), device=device, frozen=names, reduction=reduction))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("half", [("b1", "b2"), ("w1", "w2"), ("w1", "b2"), ("hidden",)])
def test_a_gradient_is_rounded_to_its_own_dtype_alone(impl, device, reduction, half):
    """Under autocast dtypes may differ. Here the gradients of float32 tensors do not fit into the
    float16 of others."""
    case = make(15, device=device, reduction=reduction, autocast=torch.bfloat16, upstream=1e9)
    for name in half:
        case.tensors[name] = case.tensors[name].half()
    got, truth = run(ours(impl), case), run(reference.pre_loss, case, torch.float64)
    for name in {"w1", "b1", "w2", "b2"} - {*half}:
        assert (got[name].double() - truth[name]).norm() < 0.05 * truth[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_over_a_few_rows_of_each_chunk(dtype, monkeypatch):
    monkeypatch.setattr(steps_torch, "IN_CACHE", 1)
    judge(
        "torch", make(19, leading=(400,), dtype=dtype, weight="leading", upstream=2.0, workspace=1)
    )


def test_float64_is_exact(device):
    case = make(5, dtype=torch.float64, device=device, weight="leading")
    got, want = run(fused_pre_loss, case), run(reference.pre_loss, case)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["mask", "all"])
def test_strides_change_no_bit(impl, device, dtype, rows):
    """The numbers are the same; the vendor's matmuls would add up those of a transposed matrix in
    another order."""
    case = make(8, leading=(343,), d=7, m=31, z=9, dtype=dtype, device=device, rows=rows)
    want = run(ours(impl), case)
    for name in ("hidden", "w1", "w2"):
        case.tensors[name] = case.tensors[name].t().contiguous().t()
    for name in ("b1", "b2"):
        case.tensors[name] = case.tensors[name][:, None].repeat(1, 2)[:, 0]
    for name, value in run(ours(impl), case).items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", ["mask", "index64"])
def test_no_rows_is_zero_and_attached(impl, device, reduction, rows):
    case = make(1, device=device, rows=rows, selected=0.0, reduction=reduction, weight="leading")
    got = run(ours(impl), case)
    assert got["loss"].shape == ((0,) if reduction == "none" else ())
    assert not got["loss"].any()
    for name in oracle.LEAVES:
        assert not got[name].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", ["mask", "index64", "all"])
def test_hidden_states_without_rows(impl, device, reduction, rows):
    got = run(ours(impl), make(1, leading=(0,), device=device, rows=rows, reduction=reduction))
    assert got["loss"].shape == ((0,) if reduction == "none" else ())
    assert not any(value.any() for value in got.values())


def test_more_rows_than_a_block_of_the_scatter(device):
    """This tests the torch path."""
    judge("torch", make(2, leading=(9000,), d=5, m=6, z=7, device=device))


def test_no_rows_with_zero_normalizer_is_zero(impl, device):
    got = run(ours(impl), make(1, device=device, selected=0.0, normalizer=0))
    assert got["loss"] == 0
    assert not got["w1"].any()


@pytest.mark.parametrize("options", [{"normalizer": 0}, {"row_weight": "zeros"}])
def test_zero_divisor_is_nan_and_leaves_other_rows_alone(impl, device, options):
    case = make(1, device=device)
    if "row_weight" in options:
        options = {"row_weight": torch.zeros(3, 17, device=device)}
    case.options.update(options)
    got = run(ours(impl), case)
    assert got["loss"].isnan()
    assert got["w1"].isnan().all()
    assert not got["hidden"][~case.rows].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_zero_predictions_and_anchors(impl, device, dtype, loss):
    case = make(2, dtype=dtype, device=device, loss=loss, bias=(False, False))
    # This row has p = 0, where the clamp makes the cosine's derivative about 1e8.
    case.tensors["hidden"][0] = 0
    case.tensors["anchor"][1] = 0
    judge(impl, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_show(impl, device, dtype):
    for value in (float("nan"), float("inf")):
        case = make(4, dtype=dtype, device=device, rows="all")
        case.tensors["hidden"][1, 3, 2] = value
        assert run(ours(impl), case)["loss"].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_backward_is_the_same(impl, device, dtype):
    case = make(6, dtype=dtype, device=device)
    leaves = {name: case.tensors[name].requires_grad_() for name in oracle.LEAVES}
    loss = fused_pre_loss(**case.tensors, rows=case.rows, impl=impl)
    first = torch.autograd.grad(
        loss, list(leaves.values()), torch.full_like(loss, 3), retain_graph=True
    )
    second = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, 3))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_differentiating_twice_is_an_error(impl, device):
    case = make(6, device=device)
    w1 = case.tensors["w1"].requires_grad_()
    loss = fused_pre_loss(**case.tensors, rows=case.rows, impl=impl)
    upstream = torch.ones_like(loss).requires_grad_()
    for given in (upstream, upstream.detach()):
        (grad,) = torch.autograd.grad(loss, w1, given, create_graph=True)
        with pytest.raises(RuntimeError, match="once-differentiable"):
            grad.sum().backward()


def test_no_grad_computes_no_gradient(impl, device, monkeypatch):
    case = make(6, device=device)
    for name in oracle.LEAVES:
        case.tensors[name].requires_grad_()
    from pre_kernels.fused.ops import steps_of

    def forbidden(*_):
        raise AssertionError("a gradient step ran under no_grad")

    monkeypatch.setattr(steps_of(impl), "weight_grad", forbidden)
    monkeypatch.setattr(steps_of(impl), "backproject", forbidden)
    with torch.no_grad():
        quiet = fused_pre_loss(**case.tensors, rows=case.rows, impl=impl)
    monkeypatch.undo()
    assert quiet == fused_pre_loss(**case.tensors, rows=case.rows, impl=impl)


def test_anchor_receives_no_gradient(impl, device):
    case = make(6, device=device)
    case.tensors["anchor"].requires_grad_()
    case.tensors["w1"].requires_grad_()
    fused_pre_loss(**case.tensors, rows=case.rows, impl=impl).backward()
    assert case.tensors["anchor"].grad is None


def test_index_order_is_the_order_of_the_result(impl, device):
    case = make(
        8, device=device, rows="index64", reduction="none", weight="compact", anchor="leading"
    )
    judge(impl, case)
    flipped = make(
        8, device=device, rows="index64", reduction="none", weight="compact", anchor="leading"
    )
    flipped.rows = flipped.rows.flip(0)
    flipped.options["row_weight"] = flipped.options["row_weight"].flip(0)
    a, b = run(ours(impl), case)["loss"], run(ours(impl), flipped)["loss"]
    torch.testing.assert_close(a, b.flip(0))


def test_chunks_change_nothing_but_rounding(impl, device):
    case = make(9, leading=(700,), device=device, rows="index32")
    whole, parts = run(ours(impl), case), run(ours(impl), case, workspace=1)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", oracle.HALF)
def test_sums_over_many_chunks_are_rounded_once(impl, device, dtype):
    judge(
        impl,
        make(
            17, leading=(2048,), d=8, m=8, z=8, dtype=dtype, device=device, rows="all", workspace=1
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_survive_a_loss_scale(impl, device, dtype):
    """Derivatives near 1e-6 vanish in float16, unless they are rounded after the upstream scale has
    entered."""
    case = make(
        10,
        leading=(500,),
        d=16,
        m=16,
        z=64,
        dtype=dtype,
        device=device,
        rows="all",
        upstream=2.0**16,
    )
    case.tensors["w2"] *= 8000
    judge(impl, case)


@pytest.mark.parametrize("name", ["hidden", "anchor"])
def test_inputs_changed_in_place_are_noticed(impl, device, name):
    case = make(11, device=device, reduction="none")
    case.tensors["w1"].requires_grad_()
    loss = fused_pre_loss(**case.tensors, rows=case.rows, **case.options, impl=impl)
    with torch.no_grad():
        case.tensors[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_may_be_reused_before_the_backward(impl, device, reduction, dtype):
    case = make(12, device=device, rows="index64", reduction=reduction)
    case.rows = case.rows.to(dtype)
    hidden = case.tensors["hidden"].requires_grad_()
    loss = fused_pre_loss(**case.tensors, rows=case.rows, **case.options, impl=impl)
    selected = case.rows.long().clone()
    case.rows.copy_(torch.arange(len(case.rows)))
    loss.sum().backward()
    touched = hidden.grad.reshape(-1, hidden.shape[-1]).abs().sum(1).nonzero().squeeze(1)
    assert torch.equal(touched, selected.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_anchors_of_an_encoder_under_inference_mode(impl, device, dtype, reduction):
    case = make(13, dtype=dtype, device=device, reduction=reduction)
    with torch.inference_mode():
        case.tensors["anchor"] = case.tensors["anchor"].clone()
    hidden = case.tensors["hidden"].requires_grad_()
    fused_pre_loss(**case.tensors, rows=case.rows, **case.options, impl=impl).sum().backward()
    assert hidden.grad.any()


def test_relu_of_infinities(impl, device):
    case = make(14, device=device, activation="relu")
    case.tensors["b1"][:3] = -float("inf")
    got = run(ours(impl), case)
    assert got["loss"].isfinite() == run(reference.pre_loss, case)["loss"].isfinite()
    assert got["loss"].isfinite()


def test_gradcheck_of_the_torch_path():
    for seed, (loss, activation) in enumerate(
        itertools.product(LOSSES, ["gelu", "gelu_tanh", "silu"])
    ):
        for reduction in ("mean", "none"):
            case = make(seed, leading=(2, 4), d=3, m=5, z=4, dtype=torch.float64, weight="leading")
            leaves = [case.tensors[name].requires_grad_() for name in oracle.LEAVES]

            def function(*values, case=case, options=(loss, activation, reduction)):
                tensors = {**case.tensors, **dict(zip(oracle.LEAVES, values, strict=True))}
                keywords = dict(zip(("loss", "activation", "reduction"), options, strict=True))
                return fused_pre_loss(**tensors, rows=case.rows, **keywords, **case.options)

            assert torch.autograd.gradcheck(function, leaves)
