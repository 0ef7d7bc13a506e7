"""Launches, bytes and host syncs of a step against the cost model, counted without running a
kernel. A lost fusion or a new wait fails here."""

import contextlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import pre_kernels
from pre_kernels import fused_pre_loss
from verify import ROOT
from verify.fences import KERNEL

from .counted import Steps, count


def products(steps):
    return sum(
        "mm" in name or "matmul" in name or "weight_grad" in name
        for name in steps.launches.elements()
    )


@pytest.mark.parametrize(
    ("impl", "rows"), [("blas", "index"), ("blas", "mask"), ("triton", "index"), ("triton", "mask")]
)
def test_launches_of_a_small_step(impl, rows):
    found = count(impl, rows)
    assert sum(found.launches.values()) == 16, found.launches
    assert found.waits == []
    assert products(found) == 6


NORMS = (None, "layer", "rms")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    ("impl", "rows"), [("blas", "index"), ("blas", "mask"), ("triton", "index"), ("triton", "mask")]
)
def test_launches_of_every_depth_and_norm(impl, rows, depth, norm):
    """Three matmuls for each layer, and the passes of the activation between two of them. The norm
    has no launch of its own: gather and scatter carry it."""
    found = count(impl, rows, depth=depth, norm=norm)
    assert products(found) == 3 * depth
    assert sum(found.launches.values()) == 16 + 5 * (depth - 2), found.launches
    assert found.launches["activate_kernel"] == found.launches["activate_grad_kernel"] == depth - 1
    assert found.launches["gather_kernel"] == 1
    assert found.launches["scatter_norm_kernel" if norm else "scatter_kernel"] == 1
    assert found.waits == []


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("impl", ["blas", "triton"])
def test_the_scale_and_shift_of_a_norm_cost_a_launch(impl, frozen):
    """The passes over the rows carry them. The launch adds up their partial sums."""
    affine = {f"norm_{x}": torch.ones(128).bfloat16() for x in ("weight", "bias")}
    plain, found = (
        count(impl, "index", norm="layer", frozen=frozen, **more) for more in ({}, affine)
    )
    assert found.launches - plain.launches == {"scale_kernel": 1}
    assert found.waits == []
    programs = 1024 * 128 // 4096
    assert found.bytes - plain.bytes == 2 * programs * 128 * 4


def test_hidden_states_without_a_gradient_are_not_written():
    """Where only the norm is trained, dH is not made."""
    affine = {f"norm_{x}": torch.ones(128).bfloat16() for x in ("weight", "bias")}
    whole, part = (
        count("blas", "index", norm="layer", frozen=True, needs_dh=needs, **affine)
        for needs in (True, False)
    )
    assert whole.launches == part.launches
    assert whole.bytes - part.bytes == 1024 * 128 * 2


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("depth", "matmuls"), [(1, 2), (2, 4), (3, 6)])
@pytest.mark.parametrize("impl", ["blas", "triton"])
def test_a_frozen_head_costs_the_products_of_the_rows_alone(impl, depth, matmuls, norm):
    found = count(impl, "index", depth=depth, norm=norm, frozen=True)
    assert products(found) == matmuls
    assert found.launches["scale_kernel"] == 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_fp8_quantises_each_weight_once(depth, row_scales):
    plain = count("blas", "index", depth=depth)
    found = count("blas", "index", depth=depth, precision="fp8", norm="layer")
    assert found.launches["quantize_kernel"] == depth
    passes = {name for name in plain.launches if name.endswith("_kernel")} - {"scatter_kernel"}
    assert {name: found.launches[name] for name in passes} == {
        name: plain.launches[name] for name in passes
    }


@pytest.mark.parametrize("impl", ["blas", "triton"])
def test_a_recomputation_repeats_the_projections_alone(impl):
    assert products(count(impl, "index", reduction="none")) == 8


@pytest.mark.parametrize(
    "options", [{"row_weight": True}, {"normalizer": 3.0}, {"reduction": "sum"}, {"loss": "mse"}]
)
def test_options_cost_no_launch_and_no_wait(options):
    plain = count("blas", "index")
    options = {**options, **({"row_weight": torch.ones(256)} if "row_weight" in options else {})}
    found = count("blas", "index", **options)
    assert sum(found.launches.values()) == sum(plain.launches.values())
    assert found.waits == []


@pytest.mark.parametrize(("impl", "launches"), [("blas", 10), ("triton", 10)])
def test_launches_of_each_further_chunk(impl, launches):
    sizes = {"n": 2048, "total": 2048, "width": 64}
    one, four = (
        count(impl, "index", workspace=workspace, **sizes) for workspace in (None, 4 * 64 * 2 * 512)
    )
    chunks = four.launches["row_loss_kernel"]
    assert chunks >= 4
    assert sum(four.launches.values()) - sum(one.launches.values()) == launches * (chunks - 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("impl", ["blas", "triton"])
def test_bytes_of_the_rows(impl, depth, norm):
    """In bfloat16 with d = m = z and every row selected, each pass reads or writes rows of that
    width only as often as it must."""
    between = depth - 1
    passes = {
        "gather": 2,
        "activations": 2 * between,
        "loss and its derivative": 3,
        "activations' derivatives": 3 * between,
        "scatter": 2 if norm is None else 3,  # The norm's derivative reads the rows once more.
    }
    n = total = 4096
    sizes = {"n": n, "total": total, "width": 256, "workspace": 1 << 30}
    steps = count(impl, "index", depth=depth, norm=norm, **sizes)
    model = sum(passes.values()) * n * 256 * 2
    sums = 2 * depth * 256 * 256 * 4  # partial sums of db by 256 programs, written and read
    weights = 2 * depth * 256 * 256 * 2  # every dW, scaled
    assert steps.bytes == model + sums + weights


@pytest.mark.parametrize("impl", ["blas", "triton"])
def test_the_backward_of_a_norm_reads_only_the_selected_rows(impl):
    n, total, width = 256, 1024, 128
    plain, normed = (count(impl, "index", n, total, width, norm=norm) for norm in (None, "layer"))
    assert normed.bytes - plain.bytes == n * width * 2


@pytest.mark.parametrize(("impl", "precision"), [("blas", None), ("blas", "fp8"), ("triton", None)])
def test_memory_of_a_step(impl, precision, request):
    """If nothing were ever freed, a step would allocate the workspace, float32 sums of the weights'
    gradients, dH, the returned gradients, and a few numbers for each row."""
    if precision == "fp8":
        request.getfixturevalue("row_scales")
    n, width = 4096, 128
    # Room for partial sums, and for a quarter of the rows in four buffers.
    workspace = 4 * 264 * 2 * width + n // 4 * 4 * width * 2
    steps = count(
        impl, "index", n=n, total=n, width=width, workspace=workspace, precision=precision
    )
    returned = 2 * (n * width + 2 * width * width + 2 * width)
    assert steps.launches["row_loss_kernel"] >= 4
    assert (
        steps.allocated
        <= workspace + 4 * width * 2 * width + n * width * 2 + returned + 8 * n + 4 * n + 1024
    )


@pytest.mark.parametrize("impl", ["blas", "triton"])
@pytest.mark.parametrize("rows", ["index", None])
def test_memory_of_a_step_in_one_chunk(impl, rows):
    """The weights' gradients are returned in the memory of their sums, and so is dH if it has all
    rows."""
    n, width = 512, 128
    found = count(impl, rows, n=n, total=n, width=width)
    returned = 2 * (n * width + 2 * width * width + 2 * width)
    sums = 4 * n // 32 * 2 * width  # partial sums of db1 and db2, by programs of 32 rows
    workspace = sums + (4 if rows else 3) * n * width * 2
    dh = n * width * 2 if rows else 0
    assert found.launches["row_loss_kernel"] == 1
    assert found.allocated <= workspace + dh + returned + 8 * n + 4 * n + 64


@pytest.mark.parametrize("bias", [None, torch.zeros(64)])
def test_without_gradients_only_the_loss_is_computed(bias):
    hidden, weight = torch.zeros(256, 64), torch.zeros(64, 64)
    steps = Steps(256)
    with (
        mock.patch.object(
            KERNEL, "run", lambda kernel, *args, **kwargs: steps.run(kernel, *args, **kwargs)
        ),
        steps,
    ):
        fused_pre_loss(hidden, hidden, weight, bias, weight, bias, impl="blas")
    product = "aten.mm.out" if bias is None else "aten.addmm.out"
    passes = ("activate_kernel", "row_loss_kernel", "divisor_kernel", "reduce_kernel")
    assert dict(steps.launches) == {product: 2} | dict.fromkeys(passes, 1)
    # These are Z, G and P, the rows' losses, the loss, and its divisor.
    assert steps.allocated == 4 * (3 * 256 * 64 + 256 + 2)


# These are counts of the host's work; bench/host.py measures its microseconds.


@contextlib.contextmanager
def calls(*targets):
    """Return how often functions of this package are called: all of them together, and each of the
    targets (owner, name)."""
    package = str(Path(pre_kernels.__file__).parent)
    counts = Counter()
    before = sys.getprofile()

    def profile(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            counts["ours"] += 1

    with contextlib.ExitStack() as stack:
        for owner, name in targets:
            real = getattr(owner, name)

            def counted(*args, real=real, name=name, **kwargs):
                counts[name] += 1
                return real(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, name, counted))
        sys.setprofile(profile)
        try:
            yield counts
        finally:
            sys.setprofile(before)


@pytest.mark.parametrize(
    ("impl", "rows", "ours", "allocations", "descriptors"),
    [
        ("blas", "index", 233, 27, 0),
        ("triton", "index", 328, 27, 18),
        ("triton", "mask", 339, 30, 18),
    ],
)
def test_work_of_the_host(impl, rows, ours, allocations, descriptors):
    """The bounds are tight: a value that is no longer kept between steps, or is computed twice,
    exceeds them."""
    count(impl, rows)
    targets = (
        (TensorDescriptor, "__post_init__"),
        (triton, "cdiv"),
        (triton, "next_power_of_2"),
        (torch, "autocast"),
    )
    with calls(*targets) as counts:
        steps = count(impl, rows)
    assert counts["ours"] <= ours
    assert steps.allocations <= allocations
    assert counts["__post_init__"] <= descriptors
    # Triton's own functions also work in kernels, and take microseconds a call.
    assert counts["cdiv"] == counts["next_power_of_2"] == 0
    # Outside autocast there is nothing to turn off.
    assert counts["autocast"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it compiles the kernels")
def test_microseconds_are_measured_without_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for flag in ([], ["--ours"]):
        command = [sys.executable, "-m", "bench.host", "--seconds", "0.1", *flag]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = re.findall(r"(.+?) +least +(\d+) µs   median +(\d+) µs   of [1-9]", done.stdout)
        assert [name for name, *_ in found] == ["blas", "triton", "triton, mask", "fp8"]
        assert all(0 < int(least) <= int(median) for _, least, median in found)
