"""The loss "gram": against the equation, by the error rule, across images, tiles and the batch."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from pre_kernels import PreHead, fused_pre_loss, reference
from pre_kernels.fused import steps_torch, sweep
from verify.oracle import compare, make, run

from ..slow import thinned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gram_case(seed, device, sizes=(7, 2, 12), text=3, form="leading", **options):
    """Images of `sizes` selected rows in one sequence, with text between them."""
    total = sum(sizes) + text * (len(sizes) + 1)
    mask = torch.zeros(total, dtype=torch.bool)
    numbers = torch.full((total,), -1)
    start = text
    for number, size in enumerate(sizes):
        mask[start : start + size] = True
        numbers[start : start + size] = 3 * number + 1
        start += size + text
    case = make(seed, leading=(total,), device=device, loss="gram", **options)
    rows = options.get("rows", "mask")
    case.rows = {"mask": mask, "index64": mask.nonzero()[:, 0]}[rows].to(device)
    compact = case.tensors["anchor"].shape[0] != total
    if compact:
        case.tensors["anchor"] = case.tensors["anchor"].new_ones(sum(sizes), 24).normal_()
    case.options["images"] = {
        "leading": numbers.to(device),
        "selected": numbers[mask].to(device),
        "host": numbers[mask].int(),
        "batch": "batch",
    }[form]
    return case


def ours(impl, **extra):
    return lambda **arguments: fused_pre_loss(**arguments, impl=impl, **extra)


def test_the_reference_by_hand():
    case = gram_case(0, "cpu", dtype=torch.float64)
    t = {name: x for name, x in case.tensors.items() if name != "anchor"}
    p = F.linear(F.gelu(F.linear(t["hidden"], t["w1"], t["b1"])), t["w2"], t["b2"])[case.rows]
    a = case.tensors["anchor"][case.rows]
    losses = []
    for i, j in ((0, 7), (7, 9), (9, 21)):
        gap = torch.empty(j - i, j - i, dtype=torch.float64)
        for r, s in itertools.product(range(i, j), repeat=2):
            cosines = [F.cosine_similarity(x[r], x[s], dim=0) for x in (p, a)]
            gap[r - i, s - i] = cosines[0] - cosines[1]
        losses.append(gap.square().mean(1))
        each = reference.pre_loss(**case.tensors, rows=case.rows, reduction="none", **case.options)
        torch.testing.assert_close(each[i:j], losses[-1])
    whole = reference.pre_loss(**case.tensors, rows=case.rows, **case.options)
    torch.testing.assert_close(whole, torch.cat(losses).mean())


@pytest.mark.parametrize(
    "chosen",
    thinned(itertools.product(["leading", "selected", "host", "batch"], DTYPES), 5),
)
def test_against_the_oracle(impl, device, chosen):
    form, dtype = chosen
    for options in (
        {"weight": "leading", "upstream": -3.0},
        {"rows": "index64", "anchor": "compact", "reduction": "none", "depth": 3, "norm": "layer"},
        {"reduction": "sum", "frozen": ("hidden", "w1"), "bias": (True, False), "depth": 1},
    ):
        # With fewer rows the error of eager, and so the rule, is luck.
        case = gram_case(1, device, (30, 2, 40), form=form, dtype=dtype, **options)
        compare(ours(impl), case)
        # Chunks of one image each.
        compare(ours(impl, workspace=1), case)


@pytest.mark.parametrize("autocast", DTYPES[1:])
def test_under_autocast(impl, device, autocast):
    compare(ours(impl), gram_case(2, device, (30, 2, 40), autocast=autocast))


def test_chunks_hold_whole_images(impl, device, monkeypatch):
    """An image of more rows than a chunk has its own chunk, and a matrix is computed by tiles."""
    sizes = (150, 20, 30, 131, 140, 2)
    case = gram_case(3, device, sizes=sizes, dtype=torch.bfloat16)
    whole = run(ours(impl), case)
    seen = []
    real = sweep.chunks
    monkeypatch.setattr(sweep, "chunks", lambda *a: seen.append(real(*a)) or seen[-1])
    for module in (sweep, steps_torch):
        monkeypatch.setattr(module, "GRAM_ELEMENTS", 2000, raising=True)
    if impl != "torch":
        from pre_kernels.fused import steps_triton

        monkeypatch.setattr(steps_triton, "GRAM_ELEMENTS", 2000)
    compare(ours(impl, workspace=1), case)
    ends = list(itertools.accumulate(sizes))
    assert {stop for _, stop in seen[0]} <= set(ends)
    assert len(seen[0]) > 2
    parts = run(ours(impl, workspace=1), case)
    for name, value in whole.items():
        torch.testing.assert_close(
            parts[name], value, rtol=0.05, atol=value.abs().max().item() / 50
        )


def test_zero_rows_and_nothing_selected(impl, device):
    case = gram_case(4, device)
    case.tensors["anchor"][4] = 0
    compare(ours(impl), case)
    case.tensors["w2"].zero_()
    case.tensors["b2"].zero_()  # Every prediction is 0, and its length is clamped.
    compare(ours(impl), case)
    empty = gram_case(5, device)
    empty.rows[:] = False
    found = run(ours(impl), empty)
    assert all(not value.any() for value in found.values())


def test_a_second_backward_gives_the_same_bits(impl, device):
    case = gram_case(6, device, dtype=torch.bfloat16)
    leaves = [case.tensors[name].requires_grad_() for name in ("hidden", "w1", "w2")]
    loss = ours(impl)(**case.tensors, rows=case.rows, **case.options)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for x, y in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(x, y)


def test_image_numbers_under_inference_mode(impl, device):
    case = gram_case(9, device, reduction="none")
    with torch.inference_mode():
        case.options["images"] = case.options["images"].clone()
    assert all(value.isfinite().all() for value in run(ours(impl), case).values())


def test_head_and_compile(device):
    head = PreHead(24, 40, loss="gram", device=device)
    case = gram_case(7, device)
    inputs = case.tensors["hidden"], case.tensors["anchor"]
    images = case.options["images"]
    eager = head(*inputs, case.rows, images=images)
    compiled = torch.compile(head, fullgraph=True)(*inputs, case.rows, images=images)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "images: got None with loss='gram', want the number"),
        ({"loss": "mse"}, "images: got a value with loss='mse', want the number"),
        ({"images": "all"}, "images: got 'all', want one of 'batch'"),
        ({"images": torch.zeros(34)}, "images: got dtype torch.float32, want int32 or int64"),
        ({"images": torch.zeros(5, 2).long()}, r"images: got shape \(5, 2\), want \(N,\)"),
        ({"images": torch.zeros(20).long()}, "images: got 20 rows, want one for each of the 21"),
        ({"images": torch.arange(33)}, "images: got one selected row of image 3, want at least"),
        ({"images": torch.arange(21) // 2 % 3}, "images: got .* several places"),
        ({"precision": "fp8"}, "precision: got 'fp8' with loss='gram', want None"),
    ],
)
def test_bad_input(changes, message):
    case = gram_case(8, "cpu")
    numbers = changes.get("images")
    if isinstance(numbers, torch.Tensor) and numbers.numel() == 21:
        changes = {"images": torch.cat([numbers[:20], numbers[-2:-1]])}
    with pytest.raises((ValueError, TypeError), match=message):
        fused_pre_loss(**case.tensors, rows=case.rows, **{**case.options, **changes})
