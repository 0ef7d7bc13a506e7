"""The counted cost of a step of "torch" on a CPU: matmuls by dtype, passes over the rows between
them, and memory."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pre_kernels import fused_pre_loss
from pre_kernels.fused import ops, products
from pre_kernels.fused.steps_torch import TorchSteps
from pre_kernels.problem import Options, Problem

N, TOTAL, WIDTH = 512, 768, 256
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Counted(TorchDispatchMode):
    """`products` counts matmuls by dtype. `passes` counts the elements of matrices that everything
    else reads and writes, divided by N · width."""

    def __init__(self):
        super().__init__()
        self.products = Counter()
        self.passes = 0.0
        self.allocated = 0
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pre_kernels":
            real, _ = ops.OPERATORS[function._schema.name.split("::")[1]]
            with self:
                return real(*args)
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = str(function)
        self.calls += 1
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        kept = {x.untyped_storage().data_ptr() for x in tensors}
        fresh = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in kept
        if fresh:
            self.allocated += result.nbytes
        if "mm" in name:
            self.products[next(x.dtype for x in tensors if x.dim() == 2)] += 1
        elif not name.startswith(("aten.empty", "aten.new_empty")) and (
            fresh or function._schema.is_mutable
        ):
            # A gather or scatter touches as many rows as the index has.
            most = next(
                (x.numel() for x in tensors if x.dtype == torch.int64 and x.dim() == 1), None
            )
            for x in (*tensors, result) if fresh else tensors:
                if x.dim() == 2 and x.shape[1] == WIDTH:
                    self.passes += (x.shape[0] if most is None else min(x.shape[0], most)) / N
            # A write in place also reads, unless it only stores.
            stores = any(word in name for word in ("copy_", "fill_", "zero_", "out"))
            if (
                function._schema.is_mutable
                and not stores
                and args[0].dim() == 2
                and args[0].shape[1] == WIDTH
            ):
                self.passes += args[0].shape[0] / N
        return result


def count(dtype, units=None, function=fused_pre_loss, n=N, total=TOTAL, width=WIDTH, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = ((total, width), (width, width), (width,), (width, width), (width,))
    leaves = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    ]
    anchor = torch.randn(total, width, generator=generator).to(dtype)
    rows = torch.arange(total - n, total)
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
        # On an Intel CPU without AMX, float32 is 1.9 times as fast as bfloat16.
        (BF16, None, None, {FP32: 6}),
        # In one chunk the weights' gradients are rounded once and never summed.
        (BF16, "AMX", None, {BF16: 6}),
        # These are two chunks.
        (BF16, "AMX", 4 * WIDTH * 2 * 256, {BF16: 8, FP32: 4}),
        # float32 holds gradients without GradScaler's factor, so nothing is computed twice.
        (FP16, None, None, {FP32: 6}),
        (FP16, "AMX", None, {FP32: 6}),
    ],
)
def test_products_by_dtype(dtype, units, workspace, want):
    assert count(dtype, units, workspace=workspace).products == want


@pytest.mark.parametrize(
    ("dtype", "units", "passes", "memory"),
    [
        (FP32, None, 40, 6.6),  # eager: 51.5 and 24.0
        (BF16, None, 48, 9.9),
        (BF16, "AMX", 46, 5.4),
        (FP16, None, 46, 9.9),
    ],
)
def test_passes_over_rows_and_new_memory(dtype, units, passes, memory):
    """Both are in rows of float32. Memory counts as if it were never freed, including what is
    returned."""
    found = count(dtype, units)
    assert found.passes <= passes
    assert found.allocated <= memory * N * WIDTH * 4


def chunk(monkeypatch, n, workspace=None, dtype=FP32, units=None):
    """Return the rows of the chunks of a selection of 1024 → 512 → 768."""
    monkeypatch.setattr(products, "HALF_UNITS", units)
    hidden, w1, w2 = (
        torch.empty((), dtype=dtype).expand(size)
        for size in ((8192, 1024), (512, 1024), (768, 512))
    )
    product = products.fastest_dtype(dtype, hidden.device)
    places = (False, False, False)
    options = Options("cosine", "gelu", "mean", product, *places, None, workspace, None, None)
    given = {"hidden": hidden, "w1": w1, "w2": w2, "anchor": hidden[:, :768]}
    given |= {"rows": torch.arange(n), "options": options}
    problem = Problem(**(dict.fromkeys(Problem._fields) | given))
    return TorchSteps.cut(problem, TorchSteps.layout(problem), n)


def test_rows_of_a_chunk(monkeypatch):
    """By default a chunk has a fourth of the rows, but not so few that matmuls become slow. A
    requested workspace is used."""
    assert chunk(monkeypatch, 500) == 500
    assert chunk(monkeypatch, 1200) == 400
    assert chunk(monkeypatch, 3000) == chunk(monkeypatch, 3000, dtype=BF16) == 750
    assert chunk(monkeypatch, 8192) == 2048
    assert chunk(monkeypatch, 8192, workspace=1 << 30) == 8192
    assert chunk(monkeypatch, 8192, workspace=1) == 64
    assert chunk(monkeypatch, 8192, dtype=BF16, units="AMX") == 8192


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_calls_of_a_small_step(dtype):
    """At N = 64 and width 64 these calls are the cost; eager makes 65."""
    assert count(dtype, n=64, total=128, width=64).calls <= 100
