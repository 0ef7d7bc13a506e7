"""What the documentation promises of a call: no host sync, a CUDA graph can hold it, torch.compile finds no break."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pre_kernels import fused_pre_loss

from . import peers, shapes
from .check import oracle
from .device import Cpu, Cuda
from .measure import interleaved, spread

Records = Iterator[dict[str, Any]]


def impls(device: Cpu | Cuda, dtype: str) -> list[str]:
    """Those that run here; on a GPU without the torch one, which promises nothing there."""
    names = ("blas", "triton") if device.kind == "cuda" else ("torch",)
    missing = (peers.BY_NAME[f"ours-{name}"].missing(device.torch_device, shapes.DTYPES[dtype]) for name in names)
    return [name for name, reason in zip(names, missing, strict=True) if reason is None]


def promises(
    device: Cpu | Cuda, shape: shapes.Shape, dtype: str, kinds: Collection[str] = ("sync", "graph", "fullgraph")
) -> Records:
    """A record for each promise of `kinds`, implementation and kind of call."""
    place = device.torch_device
    weights = {"row_weight": torch.rand(shape.batch, shape.tokens, device=place)}
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "integer rows": ("index", {}),
        "mask, leading anchor": ("mask", {}),
        "mask, leading anchor and weights": ("mask", weights),
        "normalizer on the device": ("mask", {"normalizer": torch.full((), 100.0, device=place)}),
        "normalizer of the host": ("mask", {"normalizer": 100.0}),
        "sum": ("mask", {"reduction": "sum"}),
    }
    for impl in impls(device, dtype):
        for number, (item, (rows, options)) in enumerate(calls.items()):
            about = {"peer": f"ours-{impl}", "item": item, "selection": rows}
            case = shapes.case(shape, shapes.DTYPES[dtype], place, rows)
            case.options = options
            function = partial(fused_pre_loss, impl=impl)
            if "sync" in kinds:
                yield {"kind": "sync", **about, "outcome": outcome(partial(_sync, device, function, case))}
            if isinstance(device, Cuda) and "graph" in kinds:
                yield {"kind": "graph", **about, **_figures(partial(graph, device, peers.step(function, case), case))}
            if number < 2 and "fullgraph" in kinds:  # seconds of compilation each
                yield {"kind": "fullgraph", **about, "outcome": outcome(partial(_fullgraph, function, case))}


def outcome(check: Callable[[], str]) -> str:
    """What a check says, or the first line of what it raises."""
    return _figures(lambda: {"outcome": check()})["outcome"]


def _figures(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return check()
    except Exception as error:
        return {"outcome": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}


def _sync(device: Cpu | Cuda, function: Callable[..., Tensor], case: oracle.Case) -> str:
    step = peers.step(function, case)
    step()  # compiles
    device.synchronize()
    try:
        with device.syncs_forbidden():
            step()
    finally:
        device.synchronize()
    return "no sync"


def _fullgraph(function: Callable[..., Tensor], case: oracle.Case) -> str:
    torch.compiler.reset()
    wanted = peers.step(function, case)()
    whole = torch.compile(lambda **arguments: function(**arguments), fullgraph=True)
    return "no break" if _same(peers.step(whole, case)(), wanted) else "no break, but its gradients differ"


def graph(
    device: Cpu | Cuda, step: peers.Step, case: oracle.Case, capture: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Replayed on the rows it was captured with, and on others in the same tensor: a mask of another N."""
    given = case.rows.clone()
    replay, got = (capture or _capture)(step)
    replay()
    device.synchronize()
    if not _same(got, step()):
        return {"outcome": "captured, but its gradients differ"}
    case.rows.copy_(_others(given))
    try:
        replay()
        device.synchronize()
        if not _same(got, step()):
            return {"outcome": "captured, but its gradients differ once the rows have changed"}
    finally:
        case.rows.copy_(given)
    times = interleaved(device, {"graph": replay, "step": step}, 0.5)
    medians = {f"{name}_ms": spread(samples)["median_ms"] for name, samples in times.items()}
    return {"outcome": "captured, same gradients", **medians}


def _others(rows: Tensor) -> Tensor:
    """Rows of the same capacity: the ones before them; of a mask every third less."""
    if rows.dtype != torch.bool:
        return rows - 1  # a prompt stands before the visual tokens of every shape
    fewer = rows.roll(-1, dims=-1)
    fewer[..., ::3] = False
    return fewer


def _capture(step: peers.Step) -> tuple[Callable[[], Any], tuple[Tensor, ...]]:
    """A CUDA graph of the step: what replays it, and the gradients that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = step()
    return captured.replay, got


def _same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    """Within a few roundings: the order of sums is free, and what is compiled may round less often."""
    return all(
        (a.double() - b.double()).norm() <= 8 * torch.finfo(b.dtype).eps * b.double().norm()
        for a, b in zip(got, wanted, strict=True)
    )
