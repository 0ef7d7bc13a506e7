"""Each kernel that passes over rows, by itself: edges, poisoned outputs, and a count that only the
device knows."""

import itertools

import pytest
import torch

from pre_kernels import reference
from pre_kernels.fused.kernels import rows
from pre_kernels.fused.kernels.activation import apply_activation, apply_activation_grad
from pre_kernels.fused.kernels.finish import mean_divisor, reduce_loss, scale_gradients
from pre_kernels.fused.kernels.row_loss import row_loss
from pre_kernels.fused.kernels.rows import BLOCK, gather, invert, scatter, select
from pre_kernels.fused.steps_torch import ROW_LOSSES, TorchSteps
from pre_kernels.fused.sweep import Finish, Gradients
from verify.fences import WatchedMemory, watching

from ..slow import thinned
from .support import cosine_gradient_errors, worse_than_eager

NAN = float("nan")
WIDTHS = [1, 33, 130, 5000]


def number(value, device, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def count(n: int, device) -> torch.Tensor:
    return number(n, device, torch.int32)


@pytest.mark.parametrize("total", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
@pytest.mark.parametrize("selected", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("capacity", [None, 4])
def test_select(device, total, selected, capacity):
    mask = (torch.rand(total, generator=torch.Generator().manual_seed(total)) < selected).to(device)
    index, inverse, found = select(mask, total if capacity is None else capacity)
    want = mask.nonzero().squeeze(1)
    assert found == len(want)
    kept = want[:capacity]
    assert torch.equal(index[: len(kept)].long(), kept)
    assert torch.equal((inverse >= 0).nonzero().squeeze(1), kept)
    assert torch.equal(inverse[kept].long(), torch.arange(len(kept), device=device))


def test_select_adds_up_more_blocks_than_a_block_holds(device, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 16)
    mask = torch.rand(16 * 40, generator=torch.Generator().manual_seed(0)).lt(0.4).to(device)
    index, _, found = select(mask, len(mask))
    assert torch.equal(index[:found].long(), mask.nonzero().squeeze(1))


def test_invert(device):
    index = torch.randperm(BLOCK + 90, device=device)[: BLOCK + 3]
    inverse = invert(index, BLOCK + 90)
    assert torch.equal(inverse[index].long(), torch.arange(len(index), device=device))
    assert (inverse >= 0).sum() == len(index)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_zeroes_rows_beyond_the_count(device, columns, dtype):
    x = torch.randn(9, 2 * columns, device=device)[:, ::2]
    index = torch.tensor([8, 0, 3, 3, 1, 99, 99], dtype=torch.int32, device=device)
    out = torch.full((5, columns), NAN, device=device, dtype=dtype)
    gather(x, out, index=index, count=count(5, device), start=2)
    assert torch.equal(out[:3], x[[3, 3, 1]].to(dtype))
    assert out[3:].isnan().all()
    gather(x, out, index=index, count=count(5, device), start=2, zero_padding=True)
    assert torch.equal(out[:3], x[[3, 3, 1]].to(dtype))
    assert not out[3:].any()
    gather(x, out, start=2)
    assert torch.equal(out, x[2:7].to(dtype))


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scatter_writes_every_row(device, columns, dtype):
    x = torch.randn(4, columns, device=device, dtype=dtype)
    inverse = torch.tensor([-1, 2, 0, -1, 3, 1, -1], dtype=torch.int32, device=device)
    out = torch.full((7, columns), NAN, device=device, dtype=dtype)
    scatter(x, out, inverse=inverse, upstream=number(-2.0, device))
    want = torch.where((inverse >= 0)[:, None], -2 * x[inverse.clamp_min(0).long()], 0)
    assert torch.equal(out, want)
    scatter(x, out, inverse=inverse, upstream=number(NAN, device))
    assert torch.equal(out.isnan().all(1), inverse >= 0)
    assert not out[inverse < 0].any()


@pytest.mark.parametrize(
    ("activation", "columns"), list(itertools.product(reference.ACTIVATIONS, [1, 130, 9000]))
)
def test_activations(device, activation, columns):
    z, dg = (torch.randn(21, columns, device=device) * 4 for _ in range(2))
    leaf = z.double().requires_grad_()
    want = reference.ACTIVATIONS[activation](leaf)
    (dz,) = torch.autograd.grad(want, leaf, dg.double())
    g = torch.full_like(z, NAN)
    apply_activation(z, g, activation)
    torch.testing.assert_close(g.double(), want.detach(), rtol=1e-5, atol=1e-6)
    sums = torch.full((3, columns), NAN, device=device)
    got = z.clone()
    apply_activation_grad(dg, got, activation, sums=sums, count=count(25, device), start=6)
    torch.testing.assert_close(got[:19].double(), dz[:19], rtol=1e-5, atol=1e-6)
    assert torch.equal(got[19:], z[19:])
    torch.testing.assert_close(sums.double().sum(0), dz[:19].sum(0), rtol=1e-4, atol=1e-4)
    again = z.clone()
    apply_activation_grad(
        dg, again, activation, sums=sums, first=False, count=count(25, device), start=6
    )
    torch.testing.assert_close(sums.double().sum(0), 2 * dz[:19].sum(0), rtol=1e-4, atol=1e-4)
    g.fill_(NAN)
    apply_activation(z, g, activation, count=count(25, device), start=6)
    assert torch.equal(g.isnan().all(1), torch.arange(21, device=device) >= 19)


@pytest.mark.parametrize("loss", reference.ROW_LOSSES)
@pytest.mark.parametrize("width", [3, 130, 5000, 9000])
def test_row_loss(device, loss, width):
    """Rows are short, fill a block, or are longer than a block; anchors and weights are gathered,
    and the scale is on the device."""
    p = torch.randn(9, width, device=device)
    a = torch.randn(20, 2 * width, device=device)[:, ::2]
    index = torch.randperm(20, device=device)
    weight = torch.rand(20, device=device)
    losses, sums = torch.full((20,), NAN, device=device), torch.full((2, width), NAN, device=device)
    dp = p.clone()
    row_loss(
        dp,
        a,
        losses,
        loss=loss,
        grad=True,
        index=index,
        gather_anchor=True,
        weight=weight,
        gather_weight=True,
        upstream=number(3.0, device),
        divisor=number(2.0, device),
        sums=sums,
        count=count(11, device),
        zero_padding=True,
        start=4,
    )
    leaf = p.double().requires_grad_()
    each = weight[index[4:13]] * reference.ROW_LOSSES[loss](leaf, a[index[4:13]].double())
    (want,) = torch.autograd.grad(1.5 * each[:7].sum(), leaf)
    torch.testing.assert_close(losses[4:11].double(), each[:7].detach(), rtol=1e-5, atol=1e-6)
    assert losses[:4].isnan().all()
    assert losses[11:].isnan().all()
    torch.testing.assert_close(dp.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums.double().sum(0), want.sum(0), rtol=1e-4, atol=1e-5)
    before = sums.sum(0)
    again = p.clone()
    factors = losses.nan_to_num(0.6)
    scale = {"upstream": factors, "divisor": number(2.0, device)}
    row_loss(again, a, None, loss=loss, grad=True, sums=sums, first=False, start=2, **scale)
    factors = factors[2:11].double() / 2
    (want,) = torch.autograd.grad(
        (factors * reference.ROW_LOSSES[loss](leaf, a[2:11].double())).sum(), leaf
    )
    torch.testing.assert_close(again.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((sums.sum(0) - before).double(), want.sum(0), rtol=1e-3, atol=1e-4)
    row_loss(
        again,
        a,
        None,
        loss=loss,
        grad=True,
        divisor=number(NAN, device),
        count=count(7, device),
        zero_padding=True,
    )
    assert torch.equal(again.isnan().all(1), torch.arange(9, device=device) < 7)
    assert not again[7:].any()


@pytest.mark.parametrize("cosine", ["triton", "torch"])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3, 1.0])
@pytest.mark.parametrize("width", thinned([17, 2, 300, 5000], 4))
def test_what_cancelling_leaves_is_closer_than_eager(device, cosine, noise, width):
    ours, eager = cosine_gradient_errors(device, cosine, noise, width)
    assert (ours <= eager).all(), worse_than_eager(ours, eager)


@pytest.mark.parametrize("cosine", ["triton", "torch"])
@pytest.mark.parametrize("width", [3, 5000])
@pytest.mark.parametrize("small", ["predictions", "anchors"])
def test_rows_smaller_than_the_cosines_clamp(device, cosine, width, small):
    """Below 1e-8 a norm is clamped, but its derivative is not."""
    g = torch.Generator().manual_seed(0)
    p = (
        torch.randn(6, width, generator=g)
        * torch.tensor([1e-10, 1e-12, 1e-9, 1e-8, 1.0, 0.0])[:, None]
        / width**0.5
    )
    a = torch.randn(6, width, generator=g)
    if small == "anchors":
        p, a = a, p
    leaf = p.double().requires_grad_()
    each = reference.ROW_LOSSES["cosine"](leaf, a.double())
    (want,) = torch.autograd.grad(each.sum(), leaf)
    ours = p.to(device)
    losses = torch.zeros(6, device=device)
    if cosine == "triton":
        row_loss(ours, a.to(device), losses, loss="cosine", grad=True)
    else:
        losses = ROW_LOSSES["cosine"](ours, a.to(device), True, 1.0)[:, 0]
    torch.testing.assert_close(losses.cpu().double(), each.detach(), rtol=1e-5, atol=1e-7)
    for row, exact in zip(ours.cpu().double(), want, strict=True):
        torch.testing.assert_close(row, exact, rtol=1e-4, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize("cosine", ["triton", "torch"])
@pytest.mark.parametrize("large", ["predictions", "anchors"])
def test_rows_as_large_as_float32(device, cosine, large):
    """Rows up to 1e18 behave as any others. Beyond, where a square overflows, the cosine is 0 as
    eager's is."""
    g = torch.Generator().manual_seed(0)
    p = (
        torch.randn(6, 130, generator=g)
        * torch.tensor([1e10, 1e15, 5e17, 1e20, 1e30, 1e37])[:, None]
    )
    a = torch.randn(6, 130, generator=g)
    if large == "anchors":
        p, a = a, p
    leaf = p.double().requires_grad_()
    each = reference.ROW_LOSSES["cosine"](leaf, a.double())
    (want,) = torch.autograd.grad(each[:3].sum(), leaf)
    ours = p.clone().to(device)
    losses = torch.full((6,), NAN, device=device)
    if cosine == "triton":
        row_loss(ours, a.to(device), losses, loss="cosine", grad=True)
    else:
        losses = ROW_LOSSES["cosine"](ours, a.to(device), True, 1.0)[:, 0]
    torch.testing.assert_close(losses[:3].cpu().double(), each[:3].detach(), rtol=1e-5, atol=1e-7)
    for row, exact in zip(ours[:3].cpu().double(), want, strict=False):
        torch.testing.assert_close(row, exact, rtol=1e-4, atol=1e-6 * exact.abs().max().item())
    leaf = p.requires_grad_()
    each = reference.ROW_LOSSES["cosine"](leaf, a)
    (eager,) = torch.autograd.grad(each.sum(), leaf)
    assert torch.equal(losses[3:].cpu(), each[3:].detach())
    assert torch.equal(ours[3:].cpu(), eager[3:])


def test_what_no_branch_computes_is_no_kernel(device):
    """An unknown name does not run as another loss or activation."""
    p = torch.randn(3, 8, device=device)
    for name, call in (
        ("LOSS", lambda: row_loss(p, p, None, loss="no such", grad=True)),
        ("ACTIVATION", lambda: apply_activation(p, p, "no such")),
        ("ACTIVATION", lambda: apply_activation_grad(p, p, "no such")),
    ):
        with pytest.raises(Exception, match=r"\w") as caught:
            call()
        # The compiler's error names the kernel; the function's error is its cause.
        assert f"no branch for this {name}" in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("start", [30, 60])
def test_a_chunk_beyond_the_count(device, start):
    """Nothing is read, and nothing is written but zeros where sums begin."""
    p = torch.full((20, 32), NAN, device=device)
    losses = torch.zeros(90, device=device)
    for first, was in ((True, NAN), (False, 1.0)):
        sums = torch.full((4, 32), was, device=device)
        anchor = torch.randn(90, 32, device=device)
        live = {"count": count(30, device), "start": start}
        row_loss(p, anchor, losses, loss="mse", grad=True, sums=sums, first=first, **live)
        assert torch.equal(sums, torch.full_like(sums, 0.0 if first else was))
        sums = torch.full((4, 32), was, device=device)
        apply_activation_grad(p, p, "gelu", sums=sums, first=first, **live)
        assert torch.equal(sums, torch.full_like(sums, 0.0 if first else was))
    assert not losses.any()
    assert p.isnan().all()


@pytest.mark.parametrize("n", [1, 4096, 9001])
@pytest.mark.parametrize("weighted", [False, True])
def test_reduce(device, n, weighted):
    losses = torch.randn(n + 50, device=device)
    losses[n:] = NAN
    index = torch.randperm(n + 50, device=device)
    weight = torch.rand(n + 50, device=device) if weighted else None
    live = {"count": count(n, device)}
    total, size = losses[:n].double().sum(), losses[:n].double().abs().sum()
    normal = weight[index[:n]].double().sum() if weighted else n
    for options, divisor in (
        ({"mean": True}, normal),
        ({"mean": False}, 1.0),
        ({"mean": True, "number": 7.0}, 7.0),
        ({"mean": True, "normalizer": number(-3.0, device)}, -3.0),
    ):
        denominator = mean_divisor(losses, n + 50, weight=weight, index=index, **options, **live)
        loss = reduce_loss(losses, denominator, **live)
        want = torch.as_tensor(divisor, dtype=torch.float64, device=device)
        torch.testing.assert_close(denominator.double(), want, rtol=1e-6, atol=0)
        # A sum of both signs may cancel; its error is relative to what was added up.
        bound = float(1e-6 * size / abs(divisor))
        torch.testing.assert_close(loss.double(), total / divisor, rtol=1e-6, atol=bound)


def test_reduce_of_nothing_over_nothing_and_over_zero(device):
    losses = torch.full((5,), 2.0, device=device)
    none, more = count(0, device), count(6, device)  # There is room for fewer than 6 rows.
    assert mean_divisor(losses, 5, mean=True, number=0.0, count=none) == 1.0
    assert reduce_loss(losses, number(1.0, device), none) == 0.0
    assert mean_divisor(losses, 5, mean=True, number=0.0).isnan()
    for mean in (True, False):
        assert mean_divisor(losses, 5, mean=mean, count=more).isnan()
    assert reduce_loss(losses, number(NAN, device), more).isnan()


def test_scaled_gradients_in_one_launch(device):
    w1 = torch.randn(70, 123, device=device)
    w2 = torch.randn(33, 70, device=device).bfloat16()
    w3 = torch.randn(9, 33, device=device)
    sums = [
        torch.randn(slots, columns, device=device)
        for slots, columns in ((264, 70), (1, 33), (7, 9))
    ]
    inputs = [w1, w2, w3, *sums]
    half, single = torch.bfloat16, torch.float32
    dtypes = (half, single, single, single, half, single)
    upstream = number(-1.5, device)
    got = scale_gradients(inputs[:3], sums, dtypes, upstream)
    want = [-1.5 * x.float() for x in (w1, w2, w3, *(b.sum(0) for b in sums))]
    for x, y, dtype in zip(got, want, dtypes, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(
            x, y.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5
        )
    for missing in itertools.product([False, True], repeat=6):
        tensors = [None if gone else x for gone, x in zip(missing, inputs, strict=True)]
        for x, y, gone in zip(
            scale_gradients(tensors[:3], tensors[3:], dtypes, upstream), got, missing, strict=True
        ):
            assert x is None if gone else torch.equal(x, y)
    ready = scale_gradients((w1, w2, None), (sums[0], None, None), (single,) * 6)
    assert ready[0] is w1
    assert torch.equal(ready[1], w2.float())
    torch.testing.assert_close(ready[3], sums[0].sum(0))
    assert ready[2] is ready[4] is ready[5] is None


@pytest.mark.parametrize("upstream", [1.0, -1.5])
def test_scaled_in_place(device, upstream):
    """A matrix that already has its dtype is returned itself, and is not touched if the scale is
    1."""
    w1, w2, x = (torch.randn(70, 123, device=device) for _ in range(3))
    matrices = w1.bfloat16(), w2.clone(), None
    kinds = (torch.bfloat16,) * 6
    got = scale_gradients(matrices, (None,) * 3, kinds, number(upstream, device), in_place=True)
    assert got[0] is matrices[0]
    torch.testing.assert_close(got[0], (w1.bfloat16() * upstream), rtol=0, atol=0)
    assert got[1].dtype == torch.bfloat16
    assert torch.equal(matrices[1], w2)  # This one has another dtype, so it is only read.
    scaled = x.clone()
    scatter(scaled, scaled, upstream=number(upstream, device))
    torch.testing.assert_close(scaled, x * upstream, rtol=0, atol=0)
    if upstream == 1.0 and not torch.cuda.is_available():
        memory = WatchedMemory()
        with watching(memory):
            scale_gradients(
                (matrices[0], None, None), (None,) * 3, kinds, number(1.0, device), in_place=True
            )
            assert not memory.stores
            scatter(x, x, upstream=number(1.0, device))
            assert not memory.stores


@pytest.mark.parametrize("upstream", [1.0, 2.0, -1.5])
def test_scaled_in_place_by_torch(upstream):
    w1, w2 = torch.randn(7, 12), torch.randn(5, 7)
    nothing = dict.fromkeys(Gradients._fields)
    given = Gradients(**(nothing | {"w1": w1.clone(), "w2": w2.clone()}))
    scale = number(upstream, "cpu")
    kinds = (*(torch.float32,) * 3, torch.bfloat16, *(torch.float32,) * 5)
    finish = Finish(None, None, kinds, scale, True, None, None, None, 0.0)
    got = TorchSteps.scale(given, finish)
    assert got[0] is given.w1
    # If the scale is 1, nothing is touched.
    assert (given.w1._version > 0) == (upstream != 1.0)
    torch.testing.assert_close(got[0], w1 * upstream, rtol=0, atol=0)
    torch.testing.assert_close(got[2], (w2 * upstream).bfloat16(), rtol=0, atol=0)
    assert torch.equal(given.w2, w2)
