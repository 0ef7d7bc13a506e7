"""The guarantees of the documentation: a call makes no host sync, a CUDA graph can hold it, and
torch.compile finds no break.

Each check returns its outcome in words, or raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .cases import Step, step
from .device import Cpu, Cuda
from .rule import Case

# The checks return these outcomes where the guarantee holds.
NO_SYNC = "no sync"
CAPTURED = "captured, same gradients"
NO_BREAK = "no break"


def sync(device: Cpu | Cuda, function: Callable[..., Tensor], case: Case) -> str:
    """Run a second step, in which the host must not wait for the device."""
    again = step(function, case)
    again()  # The first step compiles.
    device.synchronize()
    try:
        with device.syncs_forbidden():
            again()
    finally:
        device.synchronize()
    return NO_SYNC


@contextlib.contextmanager
def output_shapes() -> Iterator[None]:
    """Make torch.compile capture outputs whose length a mask selects. Torch 2.9 does so only with
    this setting."""
    config = torch._dynamo.config
    captured = torch.__version__.startswith("2.9.") or config.capture_dynamic_output_shape_ops
    with config.patch(capture_dynamic_output_shape_ops=captured):
        yield


def fullgraph(function: Callable[..., Tensor], case: Case, backend: str = "inductor") -> str:
    """Compile the whole call to one graph, and compare its gradients with those of the uncompiled
    call."""
    torch.compiler.reset()
    expected = step(function, case)()
    compiled = torch.compile(
        lambda **arguments: function(**arguments), fullgraph=True, backend=backend
    )
    if same_gradients(step(compiled, case)(), expected):
        return NO_BREAK
    return "no break, but its gradients differ"


def graph(
    device: Cpu | Cuda, step: Step, case: Case, capture: Callable[..., Any] | None = None
) -> tuple[str, Callable[[], Any]]:
    """Replay a graph on the rows of its capture, and on others in the same tensor: a mask of
    another N. Return the outcome, and the function that replays the graph."""
    rows = case.rows
    assert rows is not None
    first_rows = rows.clone()
    replay, gradients = (capture or captured)(step)
    replay()
    device.synchronize()
    if not same_gradients(gradients, step()):
        return "captured, but its gradients differ", replay
    rows.copy_(other_rows(first_rows))
    try:
        replay()
        device.synchronize()
        if not same_gradients(gradients, step()):
            return "captured, but its gradients differ once the rows have changed", replay
    finally:
        rows.copy_(first_rows)
    return CAPTURED, replay


def other_rows(rows: Tensor) -> Tensor:
    """Return rows of the same capacity: each row's predecessor; for a mask, every third row
    less."""
    if rows.dtype != torch.bool:
        # A prompt precedes the visual tokens of every shape, so these rows exist.
        return rows - 1
    fewer = rows.roll(-1, dims=-1)
    fewer[..., ::3] = False
    return fewer


def captured(step: Step) -> tuple[Callable[[], Any], tuple[Tensor, ...]]:
    """Capture a step in a CUDA graph; return the function that replays it, and the gradients that a
    replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    cuda_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cuda_graph):
        gradients = step()
    return cuda_graph.replay, gradients


def same_gradients(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether gradients are equal within a few roundings: the order of sums is free, and compiled
    code may round less often."""
    return all(
        bool((a.double() - b.double()).norm() <= 8 * torch.finfo(b.dtype).eps * b.double().norm())
        for a, b in zip(got, expected, strict=True)
    )
