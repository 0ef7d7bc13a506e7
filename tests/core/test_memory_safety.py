"""Every kernel between fences of NaN, with poisoned outputs.

In the interpreter each address that a kernel touches is looked at: it lies in a tensor of the
launch, and no two programs meet in it.
"""

import contextlib
import itertools

import pytest
import torch

from pre_kernels import fused_pre_loss
from pre_kernels.checks import LOSSES
from pre_kernels.fused.kernels import (
    activation,
    finish,
    gram,
    matmul,
    norm,
    quantize,
    row_loss,
    rows,
    tiles,
    weight_grad,
)
from pre_kernels.fused.kernels.common import LONGEST, arch
from pre_kernels.fused.kernels.quantize import Quantized, quantize_weight
from verify.fences import INTERPRETED, Fenced, FencedAllocations, Unfenced, WatchedMemory, watching
from verify.oracle import make, run

MODULES = (activation, finish, gram, matmul, norm, quantize, row_loss, rows, weight_grad)
KERNELS = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="addresses are seen in the interpreter alone"
)
# Each kernel has guaranteed results here, in sizes that are multiples of nothing, and in rows
# longer than a block.


def randn(device, *shape, dtype=torch.float32):
    return torch.randn(shape).to(device, dtype)


def live(f, device, count):
    return {"count": f(torch.tensor(count, dtype=torch.int32, device=device)), "start": 2}


def quantized(f, device, n, width):
    return Quantized(
        f.out(n, width, dtype=torch.float8_e4m3fn, device=device), f.out(n, device=device)
    )


def read(q, n):
    return q.values[:n].view(torch.uint8), q.scales[:n]


def gathers(f, device, width):
    x = f(randn(device, 9, 2 * width)[:, ::2])
    # Row 8 is the last one.
    index = f(torch.tensor([3, 0, 8, 2, 1, 7], dtype=torch.int32, device=device), 5)
    out = f.out(4, width, device=device)
    cleared = f.out(4, width, device=device)
    q = None
    rows.gather(x, out, index=index, **live(f, device, 5))
    rows.gather(x, cleared, index=index, zero_padding=True, **live(f, device, 5))
    if width <= LONGEST:
        q = quantized(f, device, 4, width)
        rows.gather(x, None, index=index, quantized=q, **live(f, device, 5))
    normed = f.out(4, width, device=device)
    affine = {name: f(randn(device, width)) for name in ("weight", "bias")}
    rows.gather(x, normed, index=index, norm="layer", eps=1e-5, **affine)
    return [out[:3], cleared, normed, *(read(q, 3) if q else ())]


def scatters(f, device, width):
    x = f(randn(device, 4, width))
    out = f.out(7, width, dtype=torch.bfloat16, device=device)
    inverse = f(torch.tensor([-1, 2, 0, -1, 3, 1, -1], dtype=torch.int32, device=device))
    upstream = f(torch.tensor(3.0, device=device))
    mine = f.both(x)
    rows.scatter(x, out, inverse=inverse, upstream=upstream)
    rows.scatter(mine, mine, upstream=upstream)
    normed, rms = f.out(7, width, dtype=torch.bfloat16, device=device), f.both(x)
    hidden = f(randn(device, 7, width))
    layer = {"norm": "layer", "eps": 1e-5, "weight": f(randn(device, width)), "inverse": inverse}
    sums, alone = (f.out(2, 3, width, device=device) for _ in range(2))
    norm.scatter_norm(x, hidden, normed, sums=sums, upstream=upstream, **layer)
    norm.scatter_norm(x, hidden, None, sums=alone, **layer)
    norm.scatter_norm(rms, hidden[:4].contiguous(), rms, norm="rms", eps=1e-5)
    return [out, mine, normed, sums, alone, rms]


def selects(f, device, width):
    mask = f(
        torch.rand(rows.BLOCK + width, generator=torch.Generator().manual_seed(0)).to(device) < 0.4
    )
    index, inverse, count = rows.select(mask, rows.BLOCK)
    few, cut, _ = rows.select(mask, 5)
    chosen = f(torch.randperm(rows.BLOCK + 90, device=device)[: rows.BLOCK + 3])
    return [index[: int(count)], inverse, count, few, cut, rows.invert(chosen, rows.BLOCK + 90)]


def activations(f, device, width):
    z, dg = randn(device, 9, width), randn(device, 9, width)
    g = f.out(9, width, device=device)
    dz = f.both(z, 7)
    more = f.both(z)
    sums = f.out(3, width, device=device)
    added = f.both(randn(device, 3, width))
    activation.apply_activation(f(z, 7), g, "silu", **live(f, device, 9))
    activation.apply_activation_grad(f(dg, 7), dz, "gelu", sums=sums, **live(f, device, 9))
    activation.apply_activation_grad(f(dg), more, "gelu", sums=added, first=False)
    results = [g[:7], dz[:7], sums, more, added]
    if width <= LONGEST:
        q, dq = quantized(f, device, 9, width), quantized(f, device, 9, width)
        activation.apply_activation(f(z), g, "silu", quantized=q)
        activation.apply_activation_grad(f(dg), f.both(z), "relu", quantized=dq)
        results += [*read(q, 9), *read(dq, 9)]
    return results


def row_losses(f, device, width):
    anchor, weight = f(randn(device, 20, 2 * width)[:, ::2]), f(randn(device, 20).abs())
    results = []
    n = 9 if width <= LONGEST else 4
    index, upstream = f(torch.arange(21, 1, -1, device=device) % 20, n), f(randn(device, 20), n)
    for loss, first in zip(LOSSES, itertools.cycle((True, False)), strict=False):
        p = f.both(randn(device, n, width), n - 2)
        losses = f.out(20, device=device)
        sums = f.out(2, width, device=device) if first else f.both(randn(device, 2, width))
        q = quantized(f, device, n, width) if width <= LONGEST else None
        chosen = {"index": index, "gather_anchor": True, "weight": weight, "gather_weight": True}
        row_loss.row_loss(
            p,
            anchor,
            losses,
            loss=loss,
            grad=True,
            upstream=upstream,
            sums=sums,
            first=first,
            quantized=q,
            zero_padding=first,
            **chosen,
            **live(f, device, n),
        )
        results += [p if first else p[: n - 2], losses[2:n], sums, *(read(q, 7) if q else ())]
    return results


def finishes(f, device, width):
    losses, weight = f(randn(device, width + 50), width), f(randn(device, width + 50).abs())
    index, count = (
        f(torch.randperm(width + 50, device=device), width),
        f(torch.tensor(width, device=device).int()),
    )
    divisor = finish.mean_divisor(
        losses, width + 50, mean=True, weight=weight, index=index, count=count
    )
    loss = finish.reduce_loss(losses, divisor, count)
    matrices = f(randn(device, width, 7)), f(randn(device, 33, width).bfloat16()), None
    sums = f(randn(device, 40, width)), f(randn(device, 1, 33)), f(randn(device, 2, width))
    dtypes = (torch.bfloat16, *(torch.float32,) * 3, torch.bfloat16, torch.float32)
    upstream = f(torch.tensor(3.0, device=device))
    new = finish.scale_gradients(matrices, sums, dtypes, upstream)
    mine = f.both(matrices[0].bfloat16()), f.both(matrices[1].float()), f.both(randn(device, 3, 7))
    again = finish.scale_gradients(mine, sums, dtypes, upstream, in_place=True)
    return [divisor, loss, *(x for x in (*new, *again) if x is not None)]


def grams(f, device, width):
    s, t = f(randn(device, 5, width + 5)), f(randn(device, 5, width + 5))
    e = f.out(5, width + 5, dtype=torch.bfloat16, device=device)
    losses = [f.both(randn(device, width + 5)) for _ in range(2)]
    factor = f(randn(device, width + 5))
    gram.gram_rows(s, t, e, losses[0], weight=factor, factor=factor, row=width)
    gram.gram_rows(s, t, None, losses[1], weight=None, factor=factor[0], row=0)
    return [e, *losses]


def quantizes(f, device, width):
    w1, w2 = (
        f(randn(device, *shape).bfloat16()) for shape in ((2 * width, width), (33, 2 * width))
    )
    found = [*quantize_weight(w1, True), *quantize_weight(w2, True)]
    return [x for q in found for x in (q.values.view(torch.uint8), q.scales)]


def products(f, device, width, dtype=torch.float32, k=None):
    k = k or width + 7
    w, bias = f(randn(device, k, width, dtype=dtype)), f(randn(device, width, dtype=dtype))
    x, dy = randn(device, 21, k, dtype=dtype), randn(device, 21, width, dtype=dtype)
    y, back = (f.out(21, n, dtype=dtype, device=device) for n in (width, k))
    matmul.matmul(f(x, 16), w, y, bias=bias, **live(f, device, 18))
    matmul.matmul(f(dy), w.t(), back)
    first = f.out(width, k, device=device)
    total = f.both(randn(device, width, k))
    weight_grad.add_weight_grad(first, f(dy, 16), f(x, 16), first=True, **live(f, device, 18))
    weight_grad.add_weight_grad(total, f(dy), f(x))
    strided = f(randn(device, k, 21, dtype=dtype)).t()
    last = f.out(width, k, device=device)
    weight_grad.add_weight_grad(last, f(dy), strided, first=True)
    return [y[:16], back, first, total, last]


def described(f, device, width):
    """Return sizes that tensor descriptors can have, where there are any."""
    return products(f, device, width, torch.bfloat16, k=width + 16)


CASES = {
    **{
        f"{case.__name__} {width}": (case, width)
        for case in (gathers, scatters, activations)
        for width in (1, 130, 9001)
    },
    **{f"row_losses {width}": (row_losses, width) for width in (3, 130, 9001)},
    **{
        f"{case.__name__} {width}": (case, width)
        for case in (selects, finishes, products, quantizes, grams)
        for width in (1, 70)
    },
    **{f"described {width}": (described, width) for width in (8, 136)},
}


def promised(case, f, device):
    function, width = CASES[case]
    torch.manual_seed(width)
    with FencedAllocations(f._place) if isinstance(f, Fenced) else contextlib.nullcontext():
        return function(f, device, width)


@pytest.mark.parametrize("case", CASES)
def test_between_fences(device, case):
    fenced = Fenced()
    with watching():
        found = promised(case, fenced, device)
    fenced.check()
    for ours, wanted in zip(found, promised(case, Unfenced(), device), strict=True):
        assert torch.equal(ours, wanted)
        assert ours.dtype == torch.uint8 or ours.isfinite().all()


@interpreted
def test_every_kernel_has_a_case():
    memory = WatchedMemory()
    with watching(memory):
        for case in CASES:
            if case.split()[-1] in ("1", "3", "8"):
                promised(case, Unfenced(), "cpu")
    descriptors = {name for name in KERNELS if "descriptor" in name}
    assert memory.names == (
        KERNELS if (arch(torch.empty(0)), 2) in tiles.DESCRIPTOR_TILES else KERNELS - descriptors
    )


STEPS = {
    "mask": {"dtype": torch.bfloat16},
    "chunks": {"leading": (280,), "workspace": 1, "selected": 0.5},
    "compact, none": {"anchor": "compact", "weight": "compact", "reduction": "none"},
    "index": {"rows": "index32", "dtype": torch.float16, "weight": "leading", "contiguous": False},
    "capacity": {"capacity": 45, "loss": "mse", "dtype": torch.bfloat16},
    "fp8": {"precision": "fp8", "dtype": torch.bfloat16, "d": 32, "m": 48, "z": 16},
    "depth 3, norm": {"depth": 3, "norm": "layer", "dtype": torch.bfloat16, "workspace": 1},
    "depth 1, norm": {"depth": 1, "norm": "rms", "rows": "all", "reduction": "none"},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_between_fences(impl, device, name, request):
    """With fences around arguments, buffers and results, and everything empty poisoned, the bits
    are those of a plain call."""
    if name == "fp8" and (
        impl != "blas" or (device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0))
    ):
        pytest.skip("float8 is there for blas on sm_90")
    if name == "fp8":
        request.getfixturevalue("row_scales")
    case = make(5, device=device, upstream=0.37, **STEPS[name])
    wanted = run(fused_pre_loss, case, impl=impl)
    fenced = Fenced()
    case.tensors = {key: x if x is None else fenced(x) for key, x in case.tensors.items()}
    case.rows = None if case.rows is None else fenced(case.rows)
    with watching(), FencedAllocations(fenced._place):
        outputs = run(fused_pre_loss, case, impl=impl)
    fenced.check()
    assert len(fenced.watched) > 12
    for key in wanted:
        assert torch.equal(outputs[key], wanted[key]), key
