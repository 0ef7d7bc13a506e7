"""Heads of each depth, with and without a norm, against the float64 oracle."""

import pytest
import torch

from pre_kernels import fused_pre_loss
from pre_kernels.checks import NORMS
from verify import oracle
from verify.oracle import make

from ..slow import thinned
from .support import judge, ours

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = [
    (depth, norm) for depth in (1, 2, 3) for norm in (None, *NORMS) if (depth, norm) != (2, None)
]


@pytest.mark.parametrize(("depth", "norm"), HEADS)
@pytest.mark.parametrize("dtype", thinned(DTYPES, 2))
def test_every_depth_and_norm(impl, device, depth, norm, dtype):
    """In one chunk and in several; with gradients for all, and for hidden or the head alone."""
    head = {"depth": depth, "norm": norm, "dtype": dtype, "device": device, "m": 37, "d": 48}
    for options in (
        {"leading": (3, 100), "workspace": 1, "weight": "leading", "upstream": -3.0},
        {"rows": "all", "reduction": "none"},
        {"rows": "index64", "anchor": "compact", "frozen": ("hidden",)},
        {"frozen": oracle.LEAVES[1:] + oracle.MORE_LEAVES, "loss": "mse"},
        {
            "frozen": tuple(
                {*oracle.LEAVES, *oracle.MORE_LEAVES} - {"norm_weight" if norm else "w1"}
            )
        },
    ):
        judge(impl, make(21, **head, **options))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rows", thinned(["index64", "all"], 2))
@pytest.mark.parametrize("case", [{"d": 9001, "m": 8, "leading": (2, 4)}, {"contiguous": False}])
def test_norm_of_long_and_strided_rows(impl, device, norm, case, rows):
    judge(impl, make(22, norm=norm, dtype=torch.bfloat16, device=device, rows=rows, **case))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", thinned([24, 9001], 2))
def test_a_norm_without_eps(impl, device, norm, d):
    """Rows that are not selected have no finite 1 / std then."""
    for rows in ("mask", "all"):
        sizes = {"leading": (2, 3), "d": d, "m": 8, "dtype": torch.bfloat16}
        case = make(25, norm=norm, device=device, rows=rows, norm_eps=0.0, **sizes)
        judge(impl, case)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states_under_inference_mode(impl, device, norm, reduction):
    """Only the head is trained, on states of a model that is not."""
    case = make(26, norm=norm, device=device, reduction=reduction)
    with torch.inference_mode():
        case.tensors["hidden"] = case.tensors["hidden"].clone()
    scale = case.tensors["norm_weight"].requires_grad_()
    fused_pre_loss(**case.tensors, rows=case.rows, **case.options, impl=impl).sum().backward()
    assert scale.grad.any()


@pytest.mark.parametrize(("depth", "norm"), HEADS)
def test_depth_and_norm_under_autocast_and_in_float64(device, depth, norm):
    judge("torch", make(23, depth=depth, norm=norm, dtype=torch.float64, device=device))
    for impl in ("torch", "blas", "triton"):
        judge(impl, make(23, depth=depth, norm=norm, autocast=torch.bfloat16, device=device))


def test_parameters_of_a_norm_in_another_dtype_than_its_layer(device):
    """As where mixed precision keeps norms in float32, or a head with a float32 layer a norm in
    half precision."""
    hidden, anchor = torch.randn(9, 6, device=device), torch.randn(9, 4, device=device)
    values = [torch.randn(shape, device=device) for shape in ((4, 6), (4,), (6,), (6,))]
    grads = []
    for layer, norm in ((0, 0), (0, 1), (1, 0)):
        halves = (layer, layer, norm, norm)
        w1, b1, scale, shift = leaves = [
            (x.bfloat16() if half else x.bfloat16().float()).requires_grad_()
            for x, half in zip(values, halves, strict=True)
        ]
        with torch.autocast(device.type, torch.bfloat16):
            loss = fused_pre_loss(
                hidden, anchor, w1, b1, None, None, norm="layer", norm_weight=scale, norm_bias=shift
            )
        loss.backward()
        assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]
        grads.append([x.grad.float() for x in leaves])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=0.05, atol=0.01)


def test_hidden_must_not_change_between_forward_and_backward_of_a_norm(impl, device):
    case = make(24, norm="rms", device=device)
    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items()}
    hidden = leaves.pop("hidden") * 1
    loss = ours(impl)(hidden=hidden, **leaves, rows=case.rows, norm="rms")
    with torch.no_grad():
        hidden.mul_(2)
    if impl == "torch":
        loss.backward()  # Its forward has passed the gradient through the norm.
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
