"""What the documentation promises of a call: no host sync, a CUDA graph can hold it, torch.compile
finds no break.

Each check returns what it found, or raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Step, step
from .device import Cpu, Cuda
from .rule import Case

HELD, WHOLE = (
    "captured, same gradients",
    "no break",
)  # what `graph` and `fullgraph` say where all is well


def sync(device: Cpu | Cuda, function: Callable[..., Tensor], case: Case) -> str:
    """A step after the first, in which the host must not wait for the device."""
    again = step(function, case)
    again()  # compiles
    device.synchronize()
    try:
        with device.syncs_forbidden():
            again()
    finally:
        device.synchronize()
    return "no sync"


def fullgraph(function: Callable[..., Tensor], case: Case, backend: str = "inductor") -> str:
    """The whole call in one graph of torch.compile, and the gradients that it gives without."""
    torch.compiler.reset()
    wanted = step(function, case)()
    whole = torch.compile(
        lambda **arguments: function(**arguments), fullgraph=True, backend=backend
    )
    return WHOLE if same(step(whole, case)(), wanted) else "no break, but its gradients differ"


def graph(
    device: Cpu | Cuda, step: Step, case: Case, capture: Callable[..., Any] | None = None
) -> tuple[str, Callable[[], Any]]:
    """Replayed on the rows it was captured with, and on others in the same tensor: a mask of
    another N. What was found, and what replays it."""
    rows = case.rows
    assert rows is not None
    given = rows.clone()
    replay, got = (capture or captured)(step)
    replay()
    device.synchronize()
    if not same(got, step()):
        return "captured, but its gradients differ", replay
    rows.copy_(others(given))
    try:
        replay()
        device.synchronize()
        if not same(got, step()):
            return "captured, but its gradients differ once the rows have changed", replay
    finally:
        rows.copy_(given)
    return HELD, replay


def others(rows: Tensor) -> Tensor:
    """Rows of the same capacity: the ones before them; of a mask every third less."""
    if rows.dtype != torch.bool:
        return rows - 1  # a prompt stands before the visual tokens of every shape
    fewer = rows.roll(-1, dims=-1)
    fewer[..., ::3] = False
    return fewer


def captured(step: Step) -> tuple[Callable[[], Any], tuple[Tensor, ...]]:
    """A CUDA graph of the step: what replays it, and the gradients that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    kept = torch.cuda.CUDAGraph()
    with torch.cuda.graph(kept):
        got = step()
    return kept.replay, got


def same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    """Within a few roundings: the order of sums is free, and what is compiled may round less
    often."""
    return all(
        bool((a.double() - b.double()).norm() <= 8 * torch.finfo(b.dtype).eps * b.double().norm())
        for a, b in zip(got, wanted, strict=True)
    )
