"""Each Triton kernel by itself: edges, poisoned outputs, and a count that only the device knows."""

import pytest
import torch
from oracle import judge

from pre_kernels.kernels import matmul as matmul_module
from pre_kernels.kernels import tiles
from pre_kernels.kernels import weight_grad as weight_grad_module
from pre_kernels.kernels.launch import arch
from pre_kernels.kernels.matmul import matmul
from pre_kernels.kernels.row_loss import row_loss
from pre_kernels.kernels.rows import BLOCK, invert, scatter, select
from pre_kernels.kernels.weight_grad import add_column_sum, add_weight_grad

NAN = float("nan")


def count(n: int, device) -> torch.Tensor:
    return torch.tensor(n, dtype=torch.int32, device=device)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The kinds of kernels that products launched, in order: "pointer" or "descriptor"."""
    kinds: list[str] = []

    class Spy:
        def __init__(self, kernel, kind):
            self.kernel, self.kind = kernel, kind

        def __getitem__(self, grid):
            kinds.append(self.kind)
            return self.kernel[grid]

    for module, name in ((matmul_module, "matmul"), (weight_grad_module, "weight_grad")):
        for kind, kernel in (("pointer", f"{name}_kernel"), ("descriptor", f"{name}_descriptor_kernel")):
            monkeypatch.setattr(module, kernel, Spy(getattr(module, kernel), kind))
    return kinds


def has_descriptors(device) -> bool:
    return (arch(torch.empty(0, device=device)), 2) in tiles.DESCRIPTOR_TILES


def inside(n: int, columns: int, dtype: torch.dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, columns) of NaN, and the same with 32 more rows on either side, which may be neither used nor written."""
    around = torch.full((n + 64, columns), NAN, dtype=dtype, device=device)
    return around[32 : n + 32], around


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


@pytest.mark.parametrize("first", [True, False])
def test_weight_grad_ignores_what_lies_beyond_the_count(device, first):
    dy, x = torch.randn(50, 70, device=device), torch.randn(90, 40, device=device)
    index = torch.randperm(90, device=device)
    dy[19:] = NAN
    total = torch.full((70, 40), NAN, device=device) if first else torch.randn(70, 40, device=device)
    want = dy[:19].t() @ x[index[30:49]] + (0 if first else total)
    add_weight_grad(total, dy, x, index=index, count=count(49, device), start=30, first=first)
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
    total.fill_(NAN)
    add_weight_grad(total, dy, dy, count=count(30, device), start=start, first=True)
    assert not total.any()


# live rows of (rows, K, N): within a tile; several tiles both ways; multiples of none
LIVE = [*((live, (40, 24, 72)) for live in (0, 37)), *((live, (300, 200, 328)) for live in (-30, 1, 130, 300))]
TILES = [tiles.Tile(128, 256, 64, 8, 4), tiles.Tile(64, 128, 64, 4, 6)]


@pytest.fixture(params=TILES, ids=str)
def only_tile(request, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "choose", lambda *_: request.param)


@pytest.mark.usefixtures("only_tile")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("epilogue", ["none", "activate", "activate_grad"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("live", "size"), LIVE)
def test_matmul_by_descriptor(device, launched, dtype, epilogue, transposed, live, size):
    if not has_descriptors(device):
        pytest.skip("no tensor descriptors on this device")
    (n, K, N), start = size, 30
    (x, _), (y, around), (g, around_g) = (inside(n, columns, dtype, device) for columns in (K, N, N))
    rows = max(live, 0)
    x[:rows] = torch.randn(rows, K, device=device)
    w = torch.randn(N, K, device=device).to(dtype).t() if transposed else torch.randn(K, N, device=device).to(dtype)
    bias = torch.randn(N, device=device).to(dtype) if transposed else None
    if epilogue == "activate_grad":
        y[:rows] = torch.randn(rows, N, device=device)
    z = y[:rows].double()
    aux = {"none": None, "activate": g, "activate_grad": y}[epilogue]
    matmul(x, w, y, bias=bias, count=count(start + live, device), start=start, aux=aux, epilogue=epilogue)
    assert launched == ["descriptor"]

    def products(cast):
        want = cast(x[:rows]) @ cast(w) + (0 if bias is None else cast(bias))
        if epilogue == "activate_grad":
            leaf = z.clone().requires_grad_()
            want = want * torch.autograd.grad(torch.nn.functional.gelu(leaf).sum(), leaf)[0].to(want.dtype)
        return want

    truth, eager = products(torch.Tensor.double), products(torch.Tensor.float).to(dtype)
    eps = torch.finfo(dtype).eps
    judge("y", y[:rows], eager, truth, eps, None)
    if epilogue == "activate":
        gelu = torch.nn.functional.gelu
        judge("act(y)", g[:rows], gelu(eager.float()).to(dtype), gelu(truth), eps, None)
    for outside in (around[:32], around[n + 32 :], around_g[:32], around_g[n + 32 :]):
        assert outside.isnan().all()


@pytest.mark.usefixtures("only_tile")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("live", [-30, 0, 1, 63, 64, 65, 150])
def test_weight_grad_by_descriptor(device, launched, dtype, first, live):
    if not has_descriptors(device):
        pytest.skip("no tensor descriptors on this device")
    n, M, N, start = 150, 200, 328, 30
    (dy, _), (x, _) = (inside(n, columns, dtype, device) for columns in (M, N))
    rows = max(live, 0)
    dy[:rows], x[:rows] = torch.randn(rows, M, device=device), torch.randn(rows, N, device=device)
    total, around = inside(M, N, torch.float32, device)
    if not first:
        total[:] = torch.randn(M, N, device=device)
    truth = dy[:rows].double().t() @ x[:rows].double() + (0 if first else total.double())
    eager = dy[:rows].float().t() @ x[:rows].float() + (0 if first else total)
    add_weight_grad(total, dy, x, count=count(start + live, device), start=start, first=first)
    assert launched == ["descriptor"]
    judge("total", total, eager, truth, torch.finfo(torch.float32).eps, None)
    for outside in (around[:32], around[M + 32 :]):
        assert outside.isnan().all()


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("contiguous", "descriptor"),
        ("rows of a wider matrix", "descriptor"),
        ("gathered", "pointer"),
        ("float32", "pointer"),
        ("cast", "pointer"),
        ("odd width", "pointer"),
        ("odd address", "pointer"),
        ("columns first", "pointer"),
        ("every other column", "pointer"),
    ],
)
def test_descriptors_are_used_where_they_can_be(device, launched, case, kind):
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    width = 36 if case == "odd width" else 64
    x, dy, w = (torch.randn(40, width, device=device).to(dtype) for _ in range(3))
    if case == "rows of a wider matrix":
        x = torch.randn(40, 128, device=device).to(dtype)[:, 64:]
    elif case == "odd address":
        x = torch.randn(40 * 64 + 1, device=device).to(dtype)[1:].view(40, 64)
    elif case == "columns first":
        x = x.t().contiguous().t()
    elif case == "every other column":
        x = torch.randn(40, 128, device=device).to(dtype)[:, ::2]
    elif case == "cast":
        x = x.float()
    index = torch.arange(40, device=device) if case == "gathered" else None
    y, total = torch.empty(40, 40, dtype=dtype, device=device), torch.empty(width, width, device=device)
    matmul(x, w.t(), y, index=index)
    add_weight_grad(total, dy, x, index=index, first=True)
    assert launched == [kind if has_descriptors(device) else "pointer"] * 2
    torch.testing.assert_close(y.float(), x.float() @ w.float().t(), rtol=0.02, atol=0.1)
    torch.testing.assert_close(total, dy.float().t() @ x.float(), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("table", [tiles.POINTER_TILES, tiles.DESCRIPTOR_TILES])
def test_few_rows_still_fill_the_device(table):
    anywhere = torch.empty(0)  # off the GPU an H200 is assumed
    for rows in (256, 512, 1024, 2304):
        tile = tiles.choose(table["sm90", 2], rows, 4096, anywhere)
        assert tiles.programs(tile, rows, 4096, anywhere) >= 100
    assert tiles.choose(table["sm90", 2], 9216, 4096, anywhere)[:2] == (128, 256)


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
