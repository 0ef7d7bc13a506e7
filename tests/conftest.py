"""Without a GPU the Triton kernels run in its interpreter, which has to be chosen before triton is
imported."""

import os
from importlib import metadata
from importlib.util import find_spec

import pytest
import torch

from verify import versions


def old_interpreter() -> None:
    """Triton 3.5's as it is from 3.6 on: strides of descriptors are multiples of 16 bytes, where it
    asks for multiples of 16 elements; a launch goes through the class's `run`, which tests take the
    place of."""
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, TensorDescHandle

    def run(kernel, *args, grid, warmup, **kwargs):
        return GridExecutor(kernel.rewrite(), kernel.arg_names, grid)(*args, **kwargs)

    def launcher(kernel, grid):  # past the `run` that each kernel has of its own
        return lambda *args, **kwargs: type(kernel).run(
            kernel, *args, grid=grid, warmup=False, **kwargs
        )

    TensorDescHandle.validate = lambda self: None
    InterpretedFunction.run, InterpretedFunction.__getitem__ = run, launcher


# The shipped tiles are tested, whatever was tuned on this machine.
os.environ["PRE_KERNELS_CACHE"] = os.devnull

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") and metadata.version("triton").startswith("3.5."):
        old_interpreter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--versions",
        choices=versions.ROWS,
        help="stop unless what that row of docs/models.md names is installed",
    )
    # Here, because older pytests read no deeper file before they read the options.
    parser.addoption(
        "--full-matrix",
        action="store_true",
        help="tests/integrations/test_matrix.py: every combination, not every pair",
    )


def pytest_report_header() -> str:
    found = {name: versions.installed(name) for name in versions.claims()}
    newer = [
        name
        for name, version in versions.table()["newest"].items()
        if (found[name] or version) > version
    ]
    told = f"versions: {', '.join(f'{name} {version}' for name, version in found.items())}"
    return told + (
        f"\nversions: the table of docs/models.md has no {', '.join(newer)} as new as that"
        if newer
        else ""
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    row = session.config.getoption("--versions")
    if row and (wrong := versions.differences(row)):
        raise pytest.UsageError(f"--versions {row}: {'; '.join(wrong)}")


def pytest_configure(config: pytest.Config) -> None:
    """What is deprecated is called neither by the library nor by its tests; what they call may do
    as it likes."""
    own = "pre_kernels|bench|verify|tests"
    for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", rf"error::{category}:({own})(\.|$)")
    # deprecated too, though torch does not say so by the category: an `out=` of another shape
    config.addinivalue_line(
        "filterwarnings", "error:An output with one or more elements was resized:UserWarning"
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "blas", "triton"])
def impl(request) -> str:
    return request.param


@pytest.fixture
def row_scales(device):
    """What the products of "fp8" are taken with: on a CPU older torches have one scale a tensor
    alone."""
    x = torch.zeros(16, 16, dtype=torch.float8_e4m3fn, device=device)
    rows = torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(x, x.t(), scale_a=rows, scale_b=rows.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        if device.type != "cpu":
            raise
        pytest.skip(
            f"torch {torch.__version__} has no float8 products with scales of rows on a CPU"
        )
