"""The vendor's matmuls: whether this torch can add half-precision products to float32."""

import pytest
import torch

from pre_kernels.fused import products


@pytest.fixture(autouse=True)
def _asked_anew():
    products._widens.cache_clear()
    yield
    products._widens.cache_clear()


class Cuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "error", [RuntimeError("gemm input type at::Half"), torch.OutOfMemoryError("no memory")]
)
def test_only_a_refusal_is_an_answer(monkeypatch, first, error):
    """If the library refuses, "blas" uses Triton's kernel instead."""

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(torch.ops.aten.mm if first else torch.ops.aten.addmm, "dtype_out", refuse)
    total = torch.zeros(16, 16).as_subclass(Cuda)
    dy = torch.zeros(16, 16, dtype=torch.float16)
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            products.add_product(total, dy, dy, first)
    else:
        assert not products.add_product(total, dy, dy, first)
        assert products.add_product(total, dy, dy, first, copies=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chunks_may_be_larger_than_their_sum(dtype):
    """90,000 is infinite in float16, and in bfloat16 its neighbours are 512 apart."""
    dy, x = (torch.full((1, 2), 300.0, dtype=dtype) for _ in range(2))
    total = torch.empty(2, 2)
    for first, rows in ((True, dy), (False, -dy), (False, dy / 300)):
        assert products.add_product(total, rows, x, first, copies=True)
    assert torch.equal(total, torch.full((2, 2), 300.0))
    chunk = torch.full((1, 2), 0.125, dtype=dtype)
    products.add_product(total, dy, x, True, copies=True)
    products.add_product(total, chunk, x, False, copies=True)
    assert torch.equal(total, torch.full((2, 2), 90_037.5))
    assert not products.add_product(total, dy, x, False)


def test_a_build_without_onednn_is_not_asked(monkeypatch):
    monkeypatch.setattr(products.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    assert products._half_units() is None
