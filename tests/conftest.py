"""Without a GPU the Triton kernels run in its interpreter, which has to be chosen before triton is imported."""

import os
from pathlib import Path

import pytest
import torch

os.environ["PRE_KERNELS_CACHE"] = os.devnull  # the shipped tiles, whatever was tuned on this machine

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """What is deprecated is called neither by the library nor by its tests; what they call may do as it likes."""
    own = "|".join(["pre_kernels", "bench", *sorted({path.stem for path in Path(__file__).parent.rglob("*.py")})])
    for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", rf"error::{category}:({own})(\.|$)")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "blas", "triton"])
def impl(request) -> str:
    return request.param
