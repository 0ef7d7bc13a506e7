"""Without a GPU the Triton kernels run in its interpreter, which has to be chosen before triton is imported."""

import os

import pytest
import torch

os.environ["PRE_KERNELS_CACHE"] = os.devnull  # the shipped tiles, whatever was tuned on this machine

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "blas", "triton"])
def impl(request) -> str:
    return request.param
