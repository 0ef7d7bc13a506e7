"""What a step of "torch" costs a CPU, counted: the products by dtype, the passes over rows between them, and memory."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pre_kernels import fused_pre_loss, ops, products
from pre_kernels.checks import Options, Problem
from pre_kernels.steps_torch import TorchSteps

N, TOTAL, WIDTH = 512, 768, 256
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Counted(TorchDispatchMode):
    """`products`: of each dtype. `passes`: elements of matrices that all else reads and writes, ÷ (N · width)."""

    def __init__(self):
        super().__init__()
        self.products, self.passes, self.allocated, self.calls = Counter(), 0.0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pre_kernels":
            real, _ = ops.OPERATORS[function._schema.name.split("::")[1]]
            with self:
                return real(*args)
        kwargs = kwargs or {}
        result, name = function(*args, **kwargs), str(function)
        self.calls += 1
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        kept = {x.untyped_storage().data_ptr() for x in given}
        fresh = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in kept
        if fresh:
            self.allocated += result.nbytes
        if "mm" in name:
            self.products[next(x.dtype for x in given if x.dim() == 2)] += 1
        elif not name.startswith(("aten.empty", "aten.new_empty")) and (fresh or function._schema.is_mutable):
            # gathered from, or scattered to: as many rows as the index has
            most = next((x.numel() for x in given if x.dtype == torch.int64 and x.dim() == 1), None)
            for x in (*given, result) if fresh else given:
                if x.dim() == 2 and x.shape[1] == WIDTH:
                    self.passes += (x.shape[0] if most is None else min(x.shape[0], most)) / N
            # what is written in place is read too, but for a plain store
            stores = any(word in name for word in ("copy_", "fill_", "zero_", "out"))
            if function._schema.is_mutable and not stores and args[0].dim() == 2 and args[0].shape[1] == WIDTH:
                self.passes += args[0].shape[0] / N
        return result


def count(dtype, units=None, function=fused_pre_loss, n=N, total=TOTAL, width=WIDTH, stride=1, **options):
    """`stride`: from row to row; 1 for a run of neighbours, as an image's tokens are."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((total, width), (width, width), (width,), (width, width), (width,))
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    anchor = torch.randn(total, width, generator=generator).to(dtype)
    rows = torch.arange(total - 1, total - 1 - n * stride, -stride).flip(0)
    counted = Counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "HALF_UNITS", units)
        with counted:
            loss = function(leaves[0], anchor, *leaves[1:], rows, **options)
            torch.autograd.grad(loss, leaves, torch.full((), 0.37))
    return counted


@pytest.mark.parametrize(
    ("dtype", "units", "workspace", "want"),
    [
        (FP32, None, None, {FP32: 6}),
        (FP32, "AMX", None, {FP32: 6}),
        (BF16, None, None, {FP32: 6}),  # 1.9 times as fast as bf16 on an Intel CPU with AVX512-BF16 alone
        (BF16, "AMX", None, {BF16: 6}),  # one chunk: weights' gradients are rounded once, and never summed
        (BF16, "AMX", 4 * WIDTH * 2 * 256, {BF16: 8, FP32: 4}),  # two chunks
        (FP16, None, None, {FP32: 6}),  # float32 holds what GradScaler's factor is missing from: nothing is repeated
        (FP16, "AMX", None, {FP32: 6}),
    ],
)
def test_products_by_dtype(dtype, units, workspace, want):
    assert count(dtype, units, workspace=workspace).products == want


@pytest.mark.parametrize(
    ("dtype", "units", "stride", "passes", "memory"),
    [
        (FP32, None, 1, 39, 6.1),  # eager: 54 and 25
        (FP32, None, 2, 46, 7.2),
        (BF16, None, 1, 52, 10.1),
        (BF16, "AMX", 1, 46, 5.6),
        (FP16, None, 1, 52, 10.6),
    ],
)
def test_passes_over_rows_and_new_memory(dtype, units, stride, passes, memory):
    """In rows of float32; as if nothing of the memory were ever freed, what is returned included. Neighbours are not
    copied. A bias takes two passes, which bfloat16 products hide."""
    found = count(dtype, units, total=2 * N, stride=stride)
    assert found.passes <= passes
    assert found.allocated <= memory * N * WIDTH * 4


def chunks(monkeypatch, rows, workspace=None, dtype=FP32, units=None, total=8192):
    """Rows of the chunks of a selection of 1024 → 512 → 768."""
    monkeypatch.setattr(products, "HALF_UNITS", units)
    product = products.fastest_dtype(dtype, torch.device("cpu"))
    options = Options("cosine", "gelu", "mean", product, False, False, None, workspace, None, None)
    like = torch.empty(total, 1024, dtype=dtype)
    weights = torch.empty(512, 1024, dtype=dtype), None, torch.empty(768, 512, dtype=dtype), None
    problem = Problem(like, *weights, like[:, :768], rows, None, None, options)
    selection, layout = TorchSteps.select(problem), TorchSteps.layout(problem)
    return [stop - start for start, stop in pairwise(TorchSteps.cut(problem, layout, selection))]


def test_chunks_of_a_call(monkeypatch):
    images = torch.cat([torch.arange(first, first + n) for first, n in ((6000, 700), (10, 900), (3000, 2100))])
    scattered = torch.arange(3000) * 2
    assert chunks(monkeypatch, images) == [700, 900, 700, 700, 700]  # an image's rows are no copies
    assert chunks(monkeypatch, images, dtype=BF16) == [925] * 4  # which half precision has to be
    assert chunks(monkeypatch, images, dtype=BF16, units="AMX") == [3700]
    assert chunks(monkeypatch, scattered) == [750] * 4
    assert chunks(monkeypatch, scattered[:1200]) == [400] * 3
    assert chunks(monkeypatch, scattered[:500]) == [500]
    assert chunks(monkeypatch, scattered, workspace=1 << 30) == [3000]
    assert chunks(monkeypatch, images, workspace=1 << 30) == [700, 900, 2100]
    assert max(chunks(monkeypatch, images, workspace=1)) == 64
    assert chunks(monkeypatch, torch.cat([images, scattered[:80]])) == [945] * 4  # too many breaks


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_calls_of_a_small_step(dtype):
    """At N = 64 and width 64 they are what it costs; eager makes 65."""
    assert count(dtype, n=64, total=128, width=64).calls <= 96
