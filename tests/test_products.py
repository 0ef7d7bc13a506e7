"""The vendor's products: whether this torch sums half precision into float32 in place."""

import pytest
import torch

from pre_kernels import products


@pytest.fixture(autouse=True)
def _asked_anew():
    products._sums_in_place.cache_clear()
    yield
    products._sums_in_place.cache_clear()


@pytest.mark.parametrize("message", ["self and mat2 must have the same dtype", "CUDA out of memory"])
def test_only_a_refused_dtype_is_an_answer(monkeypatch, message):
    def refuse(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(torch.ops.aten.addmm, "dtype_out", refuse)
    if "dtype" in message:
        assert not products._sums_in_place(torch.device("cpu"), torch.bfloat16)
    else:
        with pytest.raises(RuntimeError, match=message):
            products._sums_in_place(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chunks_may_be_larger_than_their_sum(dtype):
    """90,000 is infinite in float16, and in bfloat16 neighbours lie 512 apart."""
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
