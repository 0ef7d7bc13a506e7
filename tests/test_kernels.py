"""Each Triton kernel by itself: edges, poisoned outputs, and a count that only the device knows."""

import pytest
import torch

from pre_kernels.kernels.matmul import matmul
from pre_kernels.kernels.row_loss import row_loss
from pre_kernels.kernels.rows import BLOCK, invert, scatter, select
from pre_kernels.kernels.weight_grad import add_column_sum, add_weight_grad

NAN = float("nan")


def count(n: int, device) -> torch.Tensor:
    return torch.tensor(n, dtype=torch.int32, device=device)


@pytest.mark.parametrize("total", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_select(device, total, share):
    mask = (torch.rand(total, generator=torch.Generator().manual_seed(total)) < share).to(device)
    index, inverse, found = select(mask)
    want = mask.nonzero().squeeze(1)
    assert found == len(want)
    assert torch.equal(index[: len(want)].long(), want)
    assert not index[len(want) :].any()
    assert torch.equal(inverse >= 0, mask)
    assert torch.equal(inverse[want].long(), torch.arange(len(want), device=device))


def test_invert(device):
    index = torch.randperm(BLOCK + 90, device=device)[: BLOCK + 3]
    inverse = invert(index, BLOCK + 90)
    assert torch.equal(inverse[index].long(), torch.arange(len(index), device=device))
    assert (inverse >= 0).sum() == len(index)


@pytest.mark.parametrize("columns", [1, 33, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scatter_writes_every_row(device, columns, dtype):
    x = torch.randn(4, columns, device=device, dtype=dtype)
    inverse = torch.tensor([-1, 2, 0, -1, 3, 1, -1], dtype=torch.int32, device=device)
    out = torch.full((7, columns), NAN, device=device, dtype=dtype)
    scatter(x, out, inverse=inverse, scale=torch.tensor(-2.0, device=device))
    want = torch.where((inverse >= 0)[:, None], -2 * x[inverse.clamp_min(0).long()], 0)
    assert torch.equal(out, want)


@pytest.mark.parametrize("epilogue", ["none", "activate", "activate_grad"])
def test_matmul_leaves_rows_beyond_the_count_alone(device, epilogue):
    x, w, bias = (torch.randn(*shape, device=device) for shape in ((90, 40), (40, 70), (70,)))
    index = torch.randperm(90, device=device)
    y, aux = torch.full((50, 70), NAN, device=device), torch.full((50, 70), NAN, device=device)
    aux[:19] = torch.randn(19, 70, device=device)
    before = aux.clone()
    matmul(
        x,
        w,
        y,
        bias=bias,
        index=index,
        count=count(49, device),
        start=30,
        aux=aux,
        epilogue=epilogue,
        activation="relu",
    )
    want = x[index[30:49]] @ w + bias
    if epilogue == "activate_grad":
        want *= before[:19] > 0
    torch.testing.assert_close(y[:19], want)
    assert y[19:].isnan().all()
    torch.testing.assert_close(aux[:19], want.relu() if epilogue == "activate" else before[:19])
    assert aux[19:].isnan().all()


def test_matmul_takes_any_strides(device):
    x, w = torch.randn(40, 2, 9, device=device)[:, 1].t(), torch.randn(30, 40, device=device).t()
    y = torch.empty(9, 30, device=device)
    matmul(x, w, y)
    torch.testing.assert_close(y, x @ w)


def test_weight_grad_adds_and_ignores_what_lies_beyond_the_count(device):
    dy, x = torch.randn(50, 70, device=device), torch.randn(90, 40, device=device)
    index = torch.randperm(90, device=device)
    dy[19:] = NAN
    total = torch.randn(70, 40, device=device)
    want = total + dy[:19].t() @ x[index[30:49]]
    add_weight_grad(total, dy, x, index=index, count=count(49, device), start=30)
    torch.testing.assert_close(total, want)
    sums = torch.randn(70, device=device)
    want = sums + dy[:19].sum(0)
    add_column_sum(sums, dy, count=count(49, device), start=30)
    torch.testing.assert_close(sums, want)


@pytest.mark.parametrize("start", [30, 60])
def test_a_chunk_beyond_the_count_does_nothing(device, start):
    dy = torch.full((20, 32), NAN, device=device)
    total, sums = torch.zeros(32, 32, device=device), torch.zeros(32, device=device)
    losses = torch.zeros(90, device=device)
    add_weight_grad(total, dy, dy, count=count(30, device), start=start)
    add_column_sum(sums, dy, count=count(30, device), start=start)
    row_loss(
        dy, torch.randn(90, 32, device=device), losses, loss="mse", grad=True, count=count(30, device), start=start
    )
    assert not total.any()
    assert not sums.any()
    assert not losses.any()


@pytest.mark.parametrize("width", [3, 130, 5000])
def test_row_loss_of_long_and_short_rows(device, width):
    p, a = torch.randn(9, width, device=device), torch.randn(20, 2 * width, device=device)[:, ::2]
    index = torch.randperm(20, device=device)
    losses = torch.full((20,), NAN, device=device)
    dp = p.clone()
    row_loss(dp, a, losses, loss="cosine", grad=True, index=index, start=4)
    leaf = p.requires_grad_()
    want = -torch.cosine_similarity(leaf, a[index[4:13]], dim=-1)
    torch.testing.assert_close(losses[4:13], want.detach())
    torch.testing.assert_close(dp, torch.autograd.grad(want.sum(), leaf)[0])
    assert losses[:4].isnan().all()
    assert losses[13:].isnan().all()


def test_row_offsets_beyond_31_bits(device):
    """Row 2 begins more than 2^31 elements after row 0, though index and stride fit 31 bits: a stride does that without
    the memory, and an offset that wrapped would read elsewhere."""
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 64, dtype=torch.float16, device=device)  # 4 GiB of addresses, two pages touched
    x = storage.as_strided((3, 32), (stride, 1))
    x[0], x[2] = 1, 2
    rows = torch.tensor([2, 0], dtype=torch.int32, device=device)
    y = torch.empty(2, 32, dtype=torch.float16, device=device)
    eye = torch.eye(32, dtype=torch.float16, device=device)
    matmul(x, eye, y, index=rows)
    assert y[:, 0].tolist() == [2, 1]
    losses, total = torch.zeros(2, device=device), torch.zeros(32, 32, device=device)
    row_loss(y, x, losses, loss="mse", grad=False, index=rows)
    assert not losses.any()
    add_weight_grad(total, eye[:2], x, index=rows)
    assert total[:2, 0].tolist() == [2, 1]
