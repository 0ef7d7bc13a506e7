"""The same bits from two threads, from every repeat, and under deterministic algorithms."""

import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from pre_kernels import PreHead
from pre_kernels.fused.kernels import matmul
from verify.fences import INTERPRETED, KERNEL
from verify.oracle import make

from .support import as_function, equal, leaves_of, upstream_of

# torch.use_deterministic_algorithms asks cuBLAS for this, and torch reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

KERNELS = Path(matmul.__file__).parent


def cold() -> None:
    """Empty every cache of the package."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "pre_kernels":
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", int)()


def train(seed, impl, device):
    """Take a few steps with sizes and options that depend on the seed; return losses, gradients,
    and the final parameters."""
    options = {"loss": ("cosine", "mse")[seed % 2], "activation": ("gelu", "silu")[seed % 2]}
    generator = torch.Generator().manual_seed(seed)
    head = PreHead(16, 8 + 8 * seed, 24, **options)
    for p in head.parameters():
        p.data.copy_(torch.rand(p.shape, generator=generator) - 0.5)
    head.to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    seen = []
    for step in range(3 if INTERPRETED and impl != "torch" else 30):
        n = 5 + 7 * seed + step
        hidden, anchor = (
            torch.randn(n, width, generator=generator).to(device) for width in (16, 24)
        )
        hidden.requires_grad_()
        optimizer.zero_grad()
        loss = head(hidden, anchor, torch.rand(n, generator=generator).to(device) < 0.7, impl=impl)
        loss.backward()
        optimizer.step()
        seen += [loss.detach(), hidden.grad]
    return [*seen, *(p.detach() for p in head.parameters())]


def test_two_models_in_two_threads(impl, device, monkeypatch):
    if INTERPRETED:
        # The interpreter is not thread-safe, so launches take turns; everything else overlaps.
        run = KERNEL.run
        lock = threading.Lock()

        def one_at_a_time(*arguments, **keywords):
            with lock:
                return run(*arguments, **keywords)

        monkeypatch.setattr(KERNEL, "run", one_at_a_time)
    wanted = [train(seed, impl, device) for seed in range(2)]
    trained = [None, None]
    errors = []
    start = threading.Barrier(2)

    def work(seed):
        try:
            start.wait()
            trained[seed] = train(seed, impl, device)
        except BaseException as error:
            errors.append(error)

    cold()
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(often)
    assert not errors
    for ours, theirs in zip(trained, wanted, strict=True):
        equal(ours, theirs)


REPEATED = {
    "chunks": {"leading": (210,), "dtype": torch.bfloat16, "workspace": 1},
    "mask": {"leading": (60,)},
    "none": {"leading": (60,), "reduction": "none"},
    "float16, index": {"leading": (60,), "dtype": torch.float16, "rows": "index32"},
}


def results(function, leaves):
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream_of(loss))]


@pytest.mark.parametrize("name", REPEATED)
def test_the_same_bits_every_time(impl, device, name):
    case = make(22, d=32, m=32, z=32, weight="leading", device=device, **REPEATED[name])
    function = as_function(case, impl)
    leaves = leaves_of(case)
    wanted = results(function, leaves)
    # In the interpreter programs run one after another, so repeats show only whether memory is used
    # as it was found.
    for repeat in range(2 if INTERPRETED and impl != "torch" else 250):
        litter = [
            torch.full((64 * (1 + repeat % 9), 64), float("nan"), device=device) for _ in range(4)
        ]
        del litter  # The next call gets this memory.
        equal(results(function, leaves), wanted)


@pytest.mark.parametrize("name", REPEATED)
def test_deterministic_algorithms(impl, device, name):
    """Nothing raises, and the bits stay the same. torch then fills fresh memory with NaN and the
    largest integer, which reach no result."""
    case = make(22, d=32, m=32, z=32, weight="leading", device=device, **REPEATED[name])
    function = as_function(case, impl)
    leaves = leaves_of(case)
    wanted = results(function, leaves)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        equal(results(function, leaves), wanted)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_only_atomic_is_one_where_no_two_programs_meet():
    """Each element of a weight's gradient belongs to one program (tests/core/test_memory_safety.py
    watches the stores), and launches follow each other. `atomic_add` by descriptor is used because
    it loads nothing."""
    found = [
        (f.name, w)
        for f in sorted(KERNELS.glob("*.py"))
        for w in re.findall(r"atomic_\w+", f.read_text())
    ]
    assert found == [("weight_grad.py", "atomic_add")]
