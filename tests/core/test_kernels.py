"""The matmul kernels by themselves: edges, poisoned outputs, and a count that only the device
knows."""

import contextlib

import pytest
import torch
import triton
import triton.language as tl

from pre_kernels import fused_pre_loss
from pre_kernels.fused.kernels import activation, finish, tiles
from pre_kernels.fused.kernels import matmul as matmul_module
from pre_kernels.fused.kernels import row_loss as row_loss_module
from pre_kernels.fused.kernels import rows as rows_module
from pre_kernels.fused.kernels import weight_grad as weight_grad_module
from pre_kernels.fused.kernels.common import HERE, arch, on_device
from pre_kernels.fused.kernels.matmul import matmul
from pre_kernels.fused.kernels.row_loss import row_loss
from pre_kernels.fused.kernels.rows import gather, scatter
from pre_kernels.fused.kernels.weight_grad import add_weight_grad
from verify.oracle import Comparison, judge, make, run

NAN = float("nan")


def count(n: int, device) -> torch.Tensor:
    return torch.tensor(n, dtype=torch.int32, device=device)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Collect the kinds of kernels that matmuls launch, in order: "pointer" or "descriptor"."""
    kinds: list[str] = []

    class Spy:
        def __init__(self, kernel, kind):
            self.kernel, self.kind = kernel, kind

        def __getitem__(self, grid):
            kinds.append(self.kind)
            return self.kernel[grid]

    for module, name in ((matmul_module, "matmul"), (weight_grad_module, "weight_grad")):
        for kind, kernel in (
            ("pointer", f"{name}_kernel"),
            ("descriptor", f"{name}_descriptor_kernel"),
        ):
            monkeypatch.setattr(module, kernel, Spy(getattr(module, kernel), kind))
    return kinds


def has_descriptors(device) -> bool:
    return (arch(torch.empty(0, device=device)), 2) in tiles.DESCRIPTOR_TILES


def inside(n: int, columns: int, dtype: torch.dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (n, columns) of NaN, and the same with 32 more rows on either side, which may be
    neither read nor written."""
    around = torch.full((n + 64, columns), NAN, dtype=dtype, device=device)
    return around[32 : n + 32], around


def test_matmul_leaves_rows_beyond_the_count_alone(device):
    x, w, bias = (torch.randn(*shape, device=device) for shape in ((50, 40), (40, 70), (70,)))
    y = torch.full((50, 70), NAN, device=device)
    matmul(x, w, y, bias=bias, count=count(49, device), start=30)
    torch.testing.assert_close(y[:19], x[:19] @ w + bias)
    assert y[19:].isnan().all()


def test_matmul_takes_any_strides(device):
    x, w = torch.randn(40, 2, 9, device=device)[:, 1].t(), torch.randn(30, 40, device=device).t()
    y = torch.empty(9, 30, device=device)
    matmul(x, w, y)
    torch.testing.assert_close(y, x @ w)


def test_tf32_only_where_it_is_allowed():
    """The interpreter cannot show tf32, so this tests the chosen precision."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for allowed in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = allowed
            assert matmul_module.input_precision(torch.float32) == allowed
            assert matmul_module.input_precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("first", [True, False])
def test_weight_grad_ignores_what_lies_beyond_the_count(device, first):
    dy, x = torch.randn(50, 70, device=device), torch.randn(50, 40, device=device)
    dy[19:] = x[19:] = NAN
    total = (
        torch.full((70, 40), NAN, device=device) if first else torch.randn(70, 40, device=device)
    )
    want = dy[:19].t() @ x[:19] + (0 if first else total)
    add_weight_grad(total, dy, x, count=count(49, device), start=30, first=first)
    torch.testing.assert_close(total, want)


@pytest.mark.parametrize("start", [30, 60])
def test_a_chunk_beyond_the_count_does_nothing(device, start):
    dy = torch.full((20, 32), NAN, device=device)
    total = torch.ones(32, 32, device=device)
    add_weight_grad(total, dy, dy, count=count(30, device), start=start)
    assert (total == 1).all()
    add_weight_grad(total, dy, dy, count=count(30, device), start=start, first=True)
    assert not total.any()


# Each case has the live rows of (rows, K, N): within a tile, over several tiles both ways, and in
# sizes that are multiples of nothing.
LIVE = [
    *((live, (40, 24, 72)) for live in (0, 37)),
    *((live, (300, 200, 328)) for live in (-30, 1, 130, 300)),
]
TILES = [tiles.Tile(128, 256, 64, 8, 4), tiles.Tile(64, 128, 64, 4, 6)]


@pytest.fixture(params=TILES, ids=str)
def only_tile(request, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "choose", lambda *_: request.param)


@pytest.mark.usefixtures("only_tile")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("live", "size"), LIVE)
def test_matmul_by_descriptor(device, launched, dtype, transposed, live, size):
    if not has_descriptors(device):
        pytest.skip("no tensor descriptors on this device")
    n, K, N = size
    start = 30
    (x, _), (y, around) = (inside(n, columns, dtype, device) for columns in (K, N))
    rows = max(live, 0)
    x[:rows] = torch.randn(rows, K, device=device)
    w = (
        torch.randn(N, K, device=device).to(dtype).t()
        if transposed
        else torch.randn(K, N, device=device).to(dtype)
    )
    bias = torch.randn(N, device=device).to(dtype) if transposed else None
    matmul(x, w, y, bias=bias, count=count(start + live, device), start=start)
    assert launched == ["descriptor"]
    truth, eager = (cast(x[:rows]) @ cast(w) for cast in (torch.Tensor.double, torch.Tensor.float))
    if bias is not None:
        truth, eager = truth + bias.double(), eager + bias.float()
    judge(Comparison("y", y[:rows], eager.to(dtype), truth, torch.finfo(dtype).eps, None))
    for outside in (around[:32], around[n + 32 :]):
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
    judge(Comparison("total", total, eager, truth, torch.finfo(torch.float32).eps, None))
    for outside in (around[:32], around[M + 32 :]):
        assert outside.isnan().all()


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("contiguous", "descriptor"),
        ("rows of a wider matrix", "descriptor"),
        ("float32", "pointer"),
        ("cast", "pointer"),
        ("odd width", "pointer"),
        ("odd address", "pointer"),
        ("columns first", "pointer"),
        ("every other column", "pointer"),
        ("one row for all", "pointer"),
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
    elif case == "one row for all":
        x = x[:1].expand(40, -1)
    elif case == "cast":
        x = x.float()
    y, total = (
        torch.empty(40, 40, dtype=dtype, device=device),
        torch.empty(width, width, device=device),
    )
    matmul(x, w.t(), y)
    add_weight_grad(total, dy, x, first=True)
    assert launched == [kind if has_descriptors(device) else "pointer"] * 2
    torch.testing.assert_close(y.float(), x.float() @ w.float().t(), rtol=0.02, atol=0.1)
    torch.testing.assert_close(total, dy.float().t() @ x.float(), rtol=0.02, atol=0.1)


@triton.jit
def places_kernel(m_ptr, n_ptr, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    m, n = tiles.swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    tl.store(m_ptr + tl.program_id(0), m)
    tl.store(n_ptr + tl.program_id(0), n)


@pytest.mark.parametrize("tiles_m", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("tiles_n", [1, 6])
def test_every_tile_has_a_program_and_groups_take_turns(device, tiles_m, tiles_n):
    m, n = torch.zeros(2, tiles_m * tiles_n, dtype=torch.int32, device=device)
    places_kernel[(len(m),)](m, n, tiles_m, tiles_n, GROUP_M=4)
    groups = [range(first, min(first + 4, tiles_m)) for first in range(0, tiles_m, 4)]
    want = [(row, column) for rows in groups for column in range(tiles_n) for row in rows]
    assert list(zip(m.tolist(), n.tolist(), strict=True)) == want


@pytest.mark.parametrize("table", [tiles.POINTER_TILES, tiles.DESCRIPTOR_TILES])
def test_few_rows_still_fill_the_device(table):
    anywhere = torch.empty(0)  # Outside a GPU an H200 is assumed.
    for rows in (256, 512, 1024, 2304):
        tile = tiles.choose(table["sm90", 2], rows, 4096, anywhere)
        assert tiles.programs(tile, rows, 4096, anywhere) >= 100
    assert tiles.choose(table["sm90", 2], 9216, 4096, anywhere)[:2] == (128, 256)


def test_row_offsets_beyond_31_bits(device):
    """Row 2 begins more than 2^31 elements after row 0, though index and stride fit 31 bits. A
    stride does that without the memory, and a wrapped offset would read elsewhere."""
    stride = 2**30 + 64
    # These are 4 GiB of addresses, of which three pages are touched.
    storage = torch.empty(2 * stride + 64, dtype=torch.float16, device=device)
    x = storage.as_strided((3, 32), (stride, 1))
    x[0], x[1], x[2] = 1, 3, 2
    rows = torch.tensor([2, 0], dtype=torch.int32, device=device)
    y = torch.empty(2, 32, dtype=torch.float16, device=device)
    gather(x, y, index=rows)
    assert y[:, 0].tolist() == [2, 1]
    many = storage[: 2**31 + 64].view(-1, 64)
    many[-1] = 5
    out = torch.zeros(3, 64, dtype=torch.float16, device=device)
    scatter(
        many, out, inverse=torch.tensor([-1, len(many) - 1, -1], dtype=torch.int32, device=device)
    )
    assert out[:, 0].tolist() == [0, 5, 0]
    losses = torch.zeros(3, device=device)
    row_loss(y, x, losses, loss="mse", grad=False, index=rows, gather_anchor=True)
    row_loss(x.contiguous(), x, losses, loss="mse", grad=False)
    assert not losses.any()
    eye = torch.eye(32, dtype=torch.float16, device=device)
    far = storage.as_strided((2, 32), (2 * stride, 1))
    y = torch.empty(2, 32, dtype=torch.float16, device=device)
    matmul(far, eye, y)
    assert y[:, 0].tolist() == [1, 2]
    for weight in (eye, eye.float()):  # The second needs a cast, so it loads by pointers.
        y = torch.empty(3, 32, dtype=weight.dtype, device=device)
        matmul(x, weight, y)
        assert y[:, 0].tolist() == [1, 3, 2]
    total = torch.empty(32, 32, device=device)
    add_weight_grad(total, eye[:2], far, first=True)
    assert total[:2, 0].tolist() == [1, 2]
    # This needs a cast, so it loads by pointers.
    add_weight_grad(total, eye[:3].float(), x, first=True)
    assert total[:3, 0].tolist() == [1, 3, 2]


def test_every_kernel_is_launched_on_its_tensors_device(device, monkeypatch):
    """`device_map="auto"` computes on devices other than the current one, on which Triton
    launches."""
    inside = []
    launches = []

    @contextlib.contextmanager
    def entered(tensor):
        with on_device(tensor):
            inside.append(tensor)
            yield
            inside.pop()

    for module in (
        activation,
        finish,
        matmul_module,
        row_loss_module,
        rows_module,
        weight_grad_module,
    ):
        monkeypatch.setattr(module, "on_device", entered)
    kind = type(rows_module.select_kernel)
    launch = kind.run

    def spy(kernel, *args, **options):
        launches.append((kernel.fn.__name__, bool(inside)))
        return launch(kernel, *args, **options)

    monkeypatch.setattr(kind, "run", spy)
    for options in ({"rows": "mask"}, {"rows": "index64", "reduction": "none"}):
        run(
            lambda **arguments: fused_pre_loss(**arguments, impl="triton"),
            make(4, device=device, **options),
        )
    assert {
        "select_kernel",
        "invert_kernel",
        "matmul_kernel",
        "row_loss_kernel",
        "reduce_kernel",
    } <= {*dict(launches)}
    assert [name for name, where in launches if not where] == []


@pytest.mark.parametrize("current", [0, 1])
def test_the_tensors_device_is_not_the_current_one(monkeypatch, current):
    class Far:
        is_cuda = True
        device = torch.device("cuda:1")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    entered = on_device(Far())
    if current == 1:
        assert entered is HERE  # The device is current already, so nothing is entered.
    else:
        assert entered.idx == 1
