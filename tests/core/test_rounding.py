"""Arithmetic in which a GPU differs from the interpreter.

A GPU's `/`, roots and powers are off by up to 2 ulp. The tests also cover what half precision
allows, and sums that share an exchange between warps.
"""

import numpy as np
import pytest
import torch
import triton.language as tl

from pre_kernels import checks, reference
from pre_kernels.fused.kernels import common
from pre_kernels.fused.kernels.activation import apply_activation, apply_activation_grad
from pre_kernels.fused.kernels.row_loss import row_loss
from verify.fences import INTERPRETED

from ..slow import thinned
from .support import cosine_gradient_errors, worse_than_eager

NAN = float("nan")
# These are functions of the interpreter's builder. tl.div_rn and tl.sqrt_rn are exact on a GPU too.
APPROXIMATE = ("create_fdiv", "create_rsqrt", "create_exp", "create_exp2")


@pytest.fixture(params=["as it is", "more", "less"])
def rounding(request, monkeypatch):
    """Move the interpreter's approximate instructions by 2 ulp, all in one direction."""
    if request.param == "as it is":
        return request.param
    if not INTERPRETED:
        pytest.skip("a GPU rounds as it does")
    from triton.runtime.interpreter import InterpreterBuilder

    way = 1 if request.param == "more" else -1

    def moved(exact):
        def function(builder, *operands):
            result = exact(builder, *operands)
            if result.data.dtype == np.float32:
                result.data = result.data * np.float32(1 + way * 2**-22)
            return result

        return function

    for name in APPROXIMATE:
        monkeypatch.setattr(InterpreterBuilder, name, moved(getattr(InterpreterBuilder, name)))
    return request.param


@pytest.mark.parametrize("rounding", ["more", "less"], indirect=True)
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3, 1.0])
@pytest.mark.parametrize("width", thinned([17, 2, 300], 3))
def test_what_cancelling_leaves_where_divisions_are_not_exact(device, rounding, noise, width):
    ours, eager = cosine_gradient_errors(device, "triton", noise, width)
    assert (ours <= eager).all(), worse_than_eager(ours, eager)


def halves(dtype, device):
    """Return each number that `dtype` has, as (16, 4096)."""
    return (
        torch.arange(-(2**15), 2**15, dtype=torch.int32)
        .short()
        .view(dtype)
        .reshape(16, -1)
        .to(device)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_of_every_number_of_half_precision(device, rounding, dtype):
    """Before rounding, the error is at most a twentieth of the dtype's last place, in the tail too,
    which float32's erf loses from -5.6 on. The derivative, which has a zero, is judged by its two
    terms."""
    x = halves(dtype, device)
    value, slope = (
        torch.full((16, 4096), NAN, device=device),
        torch.full((16, 4096), NAN, device=device),
    )
    apply_activation(x, value, "gelu")
    # Each program has one row, so its sum is the row itself, in float32.
    apply_activation_grad(torch.ones_like(value), x.clone(), "gelu", sums=slope)
    x, value, slope = (t.cpu() for t in (x, value, slope))
    y = x[x.isfinite()].double()
    finite = x.isfinite()
    leaf = y.clone().requires_grad_()
    want = leaf * torch.special.erfc(-leaf / 2**0.5) / 2
    last_place = torch.exp2(want.detach().abs().log2().floor()).clamp_min(torch.finfo(dtype).tiny)
    # Below the smallest normal number a GPU's powers of 2 are 0.
    t, smallest = y.abs(), torch.finfo(torch.float32).tiny
    assert (
        (value[finite] - want).abs() <= torch.finfo(dtype).eps / 20 * last_place + smallest / 2
    ).all()
    (want,) = torch.autograd.grad(want.sum(), leaf)
    terms = (
        torch.special.erfc(t / 2**0.5) / 2 + t * torch.exp(-t.square() / 2) / (2 * torch.pi) ** 0.5
    )
    allowed = 1.5e-6 if rounding == "as it is" and INTERPRETED else 3e-6
    allowed = allowed * (1 + (t / 3) ** 4) * terms + 2**-23 * (y > 0) + smallest * t
    assert ((slope[finite] - want).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gelu_of_what_is_no_number(device, dtype):
    """The result is that of float64, and a zero keeps its sign."""
    x = torch.tensor([[float("inf"), -float("inf"), NAN, 0.0, -0.0]], dtype=dtype, device=device)
    value = torch.empty(1, 5, device=device)
    slope = x.clone()
    apply_activation(x, value, "gelu")
    apply_activation_grad(torch.ones_like(x), slope, "gelu")
    leaf = x.double().requires_grad_()
    want = reference.ACTIVATIONS["gelu"](leaf)
    torch.testing.assert_close(value.double(), want.detach(), rtol=0, atol=0, equal_nan=True)
    (want,) = torch.autograd.grad(want.sum(), leaf)
    torch.testing.assert_close(slope.double(), want, rtol=0, atol=0, equal_nan=True)
    assert value[0, 3:].signbit().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
def test_activations_of_half_precision_as_in_float32(device, rounding, dtype, activation):
    """The cheaper forms differ by at most a hundredth of the dtype's eps."""
    x = halves(dtype, device)
    x = torch.where(x.isfinite(), x, 0)
    results = []
    for z in (x, x.float()):
        value, slope = (
            torch.full((16, 4096), NAN, device=device),
            torch.full((16, 4096), NAN, device=device),
        )
        apply_activation(z, value, activation)
        apply_activation_grad(torch.ones_like(value), z.clone(), activation, sums=slope)
        results.append((value, slope))
    for half, single in zip(*results, strict=True):
        info = torch.finfo(dtype)
        torch.testing.assert_close(
            half, single, rtol=info.eps / 100, atol=max(1e-6, info.tiny), equal_nan=True
        )


@pytest.mark.skipif(not INTERPRETED, reason="a GPU takes the other branch alone")
def test_sums_in_one_exchange(monkeypatch):
    """This tests the branch that is compiled, with the interpreter's own slow reduction."""
    p, a = torch.randn(5, 130), torch.randn(5, 130)
    results = []
    for interpret in (True, False):
        monkeypatch.setattr(common, "INTERPRET", tl.constexpr(interpret))
        dp = p.clone()
        losses = torch.zeros(5)
        row_loss(dp, a, losses, loss="cosine", grad=True)
        results.append((dp, losses))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
