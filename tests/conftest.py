"""Chooses Triton's interpreter where there is no GPU. This has to happen before triton is
imported."""

import gc
import os
import signal
import zlib
from importlib import metadata
from importlib.util import find_spec

import pytest
import torch

from verify import versions


def old_interpreter() -> None:
    """Makes the interpreter of triton 3.5 behave like that of 3.6. Strides of descriptors have to
    be multiples of 16 bytes, while 3.5 asks for multiples of 16 elements. A launch goes through
    `run` of the class, which tests replace."""
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, TensorDescHandle

    def run(kernel, *args, grid, warmup, **kwargs):
        return GridExecutor(kernel.rewrite(), kernel.arg_names, grid)(*args, **kwargs)

    # Each kernel of triton 3.5 has its own `run`; this launcher calls that of the class.
    def launcher(kernel, grid):
        return lambda *args, **kwargs: type(kernel).run(
            kernel, *args, grid=grid, warmup=False, **kwargs
        )

    TensorDescHandle.validate = lambda self: None
    InterpretedFunction.run, InterpretedFunction.__getitem__ = run, launcher


# In the background of a script ^C is ignored, also by the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests use the shipped tiles, even if others were tuned on this machine.
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
    # It is in this file, because an older pytest reads no deeper conftest.py before the options.
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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws depends on its name alone, so a failure comes again."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # `_quick_collections` froze


def pytest_configure(config: pytest.Config) -> None:
    """Deprecation warnings from the library or its tests are errors; those from other packages are
    not."""
    own = "pre_kernels|bench|verify|tests"
    for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", rf"error::{category}:({own})(\.|$)")
    # An `out=` of another shape is deprecated too, though torch warns with another category.
    config.addinivalue_line(
        "filterwarnings", "error:An output with one or more elements was resized:UserWarning"
    )


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """Every training of accelerate collects garbage, which takes half a second with all the modules
    that are imported. Python no longer looks at what exists before a file's first test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "blas", "triton"])
def impl(request) -> str:
    return request.param


@pytest.fixture
def row_scales(device):
    """Skips the test where torch cannot compute the matmuls of "fp8": on a CPU an older torch has
    only one scale per tensor."""
    x = torch.zeros(16, 16, dtype=torch.float8_e4m3fn, device=device)
    rows = torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(x, x.t(), scale_a=rows, scale_b=rows.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        if device.type != "cpu":
            raise
        pytest.skip(
            f"torch {torch.__version__} has no float8 matmuls with a scale per row on a CPU"
        )
