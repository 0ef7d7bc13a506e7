"""Every kernel at the last element of tensors whose offsets take more than 31 bits, by addresses
without memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pre_kernels.fused.kernels import (
    activation,
    finish,
    matmul,
    norm,
    quantize,
    row_loss,
    rows,
    weight_grad,
)
from pre_kernels.fused.kernels.quantize import Quantized, quantize_weight
from verify.fences import INTERPRETED, LastProgram, Unbacked, span, watching

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="addresses are seen in the interpreter only"
)

E4M3 = torch.float8_e4m3fn
R = 2**19 + 512
D = 4096
M, N = 2**16, 2**15 + 128
ZEROS = torch.zeros(R)


def far_gather(far):
    rows.gather(
        torch.zeros(1, D),
        far(R, D),
        index=torch.zeros(R, dtype=torch.int32),
        quantized=Quantized(far(R, D, dtype=E4M3), ZEROS),
    )


def far_gather_columns(far):
    rows.gather(far(R, D), torch.zeros(1, D), start=R - 1)
    rows.gather(far(D, R).t(), torch.zeros(1, D), start=R - 1)


def far_scatter(far):
    rows.scatter(far(R, D), far(R, D))


def far_norm(far):
    norm.scatter_norm(far(R, D), far(R, D), far(R, D), norm="layer", eps=1e-5)
    norm.scatter_norm(
        torch.zeros(1, D), far(D, R).t()[R - 1 :], torch.zeros(1, D), norm="rms", eps=1
    )
    rows.gather(far(D, R).t(), torch.zeros(1, D), start=R - 1, norm="rms", eps=1e-5)


def far_quantize(far):
    quantize_weight(far(R, D), False)


def far_activation(far):
    activation.apply_activation(
        far(R, D), far(R, D), "gelu", quantized=Quantized(far(R, D, dtype=E4M3), ZEROS)
    )


def far_activation_grad(far):
    sums = far(R, D, dtype=torch.float32)
    activation.apply_activation_grad(far(R, D), far(R, D), "gelu", sums=sums, first=False)


def far_row_loss(far):
    p, sums = far(R, D), far(R, D, dtype=torch.float32)
    room = Quantized(far(R, D, dtype=E4M3), ZEROS)
    row_loss.row_loss(
        p, far(R, D), ZEROS, loss="mse", grad=True, sums=sums, first=False, quantized=room
    )


def far_row_loss_columns(far):
    # One width fits a block, and the other takes several.
    for width, loss in ((D, "cosine"), (3 * D, "cosine"), (3 * D, "mse")):
        p = torch.zeros(1, width)
        row_loss.row_loss(p, far(width, R).t(), torch.zeros(R), loss=loss, grad=True, start=R - 1)


def far_matmul(far):
    many = 2**26 + 64
    float32 = torch.float32
    matmul.matmul(far(many, 32, dtype=float32), torch.zeros(32, 16), far(many, 16, dtype=float32))
    matmul.matmul(torch.zeros(R, 16), torch.zeros(16, D), far(R, D, dtype=float32))


def far_matmul_columns(far):
    matmul.matmul(far(D, R, dtype=torch.float32).t()[-1:], torch.zeros(D, 16), torch.zeros(1, 16))


def far_weight(far):
    many = 2**26 + 64
    float32 = torch.float32
    matmul.matmul(torch.zeros(1, 32), far(many, 32, dtype=float32).t(), far(1, many, dtype=float32))


def far_weight_grad(far):
    weight_grad.add_weight_grad(
        far(M, N, dtype=torch.float32), torch.zeros(1, M), torch.zeros(1, N)
    )
    weight_grad.add_weight_grad(
        torch.zeros(16, D), torch.zeros(1, 16), far(D, R, dtype=torch.float32).t()[-1:]
    )


def far_scale(far):
    class Empty(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            big = "new_empty" in str(function) and math.prod(args[1]) > 2**31
            return far(*args[1], dtype=torch.float32) if big else function(*args, **(kwargs or {}))

    with Empty():
        dtypes = (torch.float32,) * 6
        for place in range(3):
            matrices = [None] * 3
            matrices[place] = far(M, N, dtype=torch.float32)
            finish.scale_gradients(matrices, (None,) * 3, dtypes, torch.tensor(2.0))


FAR = [value for name, value in list(vars().items()) if name.startswith("far_")]


@pytest.mark.parametrize("case", FAR, ids=lambda case: case.__name__)
def test_offsets_beyond_31_bits(case):
    """The last program reaches the last element and nothing beyond, by addresses only, because
    there is no memory."""
    far = Unbacked()
    memory = LastProgram(far.spans)
    with watching(memory):
        case(far)
    assert far.tensors
    for x in far.tensors:
        begin, end = span(x)[:2]
        assert memory.reached.get(begin) == end - x.element_size()


def test_offsets_beyond_31_bits_in_strips_of_columns(monkeypatch):
    """The last strip is not the last program. Turns have many rows, because the interpreter takes
    them one by one."""
    monkeypatch.setattr(quantize, "TALL", 2**15)
    monkeypatch.setattr(quantize, "WIDE", 2)
    far = Unbacked()
    weight = far(R, D)
    memory = LastProgram(far.spans, program=D // quantize.WIDE - 1)
    with watching(memory):
        quantize_weight(weight, True)
    assert memory.reached == {span(weight)[0]: span(weight)[1] - weight.element_size()}
