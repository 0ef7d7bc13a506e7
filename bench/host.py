"""Host microseconds until a forward and backward are queued: `python -m bench.host`.

It runs each call of each implementation in turn, round by round, and prints the minimum and the
median of the rounds.

On a GPU all of it is real: the device is idle when a step begins, and nobody waits for it before
the clock has stopped.

Without a GPU the device's part is removed. The time is then a part of the time on a GPU: this
package, autograd and torch's dispatcher on small tensors in the CPU's memory, and all of Triton's
Python from `kernel[grid](...)` on (binding of arguments, specialisation, key and look-up of the
compiled kernel). These are not in it: Triton's launcher in C and the tensor maps that it fills, the
driver, `torch.cuda.device`, the vendor's matmuls (`torch.mm` and others return at once), and the
difference between CUDA's allocator and the CPU's. With --ours a Triton launch returns at once too,
which leaves the part that this package can change.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from pre_kernels import fused_pre_loss, screen

from . import where

CALLS: dict[str, dict[str, Any]] = {
    "blas": {"impl": "blas"},
    "triton": {"impl": "triton"},
    "triton, mask": {"impl": "triton", "rows": "mask"},
    "fp8": {"impl": "blas", "precision": "fp8"},
}


class Driver:
    """The answers of an idle H200 to the questions of Triton's Python."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _compiled(kernel: Any, key: Any, signature: Any, device: int, *rest: Any) -> Any:
    done = SimpleNamespace(
        launch_metadata=_nothing, run=_nothing, function=None, packed_metadata=None
    )
    kernel.device_caches[device][0][key] = done
    return done


@contextmanager
def without_device(ours: bool) -> Iterator[None]:
    """Make launches and the vendor's matmuls do nothing, and let the CPU's memory pass for a
    GPU's."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    patches = [mock.patch.object(torch, name, _nothing) for name in ("mm", "addmm", "_scaled_mm")]
    patches.append(mock.patch("pre_kernels.loss.unavailable", _nothing))
    # On a GPU the values of rows are not read either.
    patches.append(mock.patch("pre_kernels.device_checks.row_values", _nothing))
    if ours:
        patches.append(mock.patch.object(JITFunction, "run", _nothing))
    else:
        patches.append(mock.patch.object(JITFunction, "_do_compile", _compiled))
        driver.set_active(Driver())
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def step(device: str, rows: str = "index", **options: Any) -> Callable[[], Any]:
    """Return a forward and backward with every gradient: 256 rows, as of one small image."""
    width = 3584 if device == "cuda" else 64
    total = 1024
    n = 256
    shapes = ((total, width), (width, width), (width,), (width, width), (width,))
    leaves = [
        torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
        for shape in shapes
    ]
    anchor = torch.zeros(total, width, dtype=torch.bfloat16, device=device)
    mask = torch.arange(total, device=device) < n
    selection = mask if rows == "mask" else mask.nonzero().squeeze(1)
    upstream = torch.full((), 0.37, device=device)

    def run() -> Any:
        loss = fused_pre_loss(leaves[0], anchor, *leaves[1:], selection, **options)
        return torch.autograd.grad(loss, leaves, upstream)

    return run


def measure(device: str, seconds: float) -> dict[str, list[float]]:
    """Return the microseconds of each call, sampled for `seconds`. Calls that cannot run here are
    left out."""
    steps: dict[str, Callable[[], Any]] = {}
    for name, options in CALLS.items():
        steps[name] = step(device, **options)
        try:
            for _ in range(20):
                steps[name]()
        except RuntimeError as error:
            print(f"{name}: {error}")
            del steps[name]
    samples: dict[str, list[float]] = {name: [] for name in steps}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, run in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = run()
            samples[name].append((time.perf_counter() - start) * 1e6)
            del result
    return samples


def main() -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("--ours", action="store_true", help="leave out Triton's Python; only without a GPU")
    add("--seconds", type=float, default=10.0, help="seconds of measuring (default: 10)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets the kernels; unset it")
    with nullcontext() if device == "cuda" else without_device(arguments.ours):
        by_call = measure(device, arguments.seconds)
    for name, samples in by_call.items():
        print(
            f"{name:14} least {min(samples):7.0f} µs   "
            f"median {statistics.median(samples):7.0f} µs   of {len(samples)}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
