"""The documentation's guarantees of a call: it does not make the host wait, a CUDA graph can
capture it, and torch.compile finds no graph break."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pre_kernels import fused_pre_loss
from pre_kernels.check import guarantees as checks
from pre_kernels.check.device import Cpu, Cuda
from pre_kernels.check.rule import Case
from pre_kernels.check.timing import interleaved, spread

from . import baselines, shapes

Records = Iterator[dict[str, Any]]


def impls(device: Cpu | Cuda, dtype: str) -> list[str]:
    """Return the implementations that run here; on a GPU without the torch one, which guarantees
    nothing there."""
    names = ("blas", "triton") if device.kind == "cuda" else ("torch",)
    missing = (
        baselines.BY_NAME[f"ours-{name}"].missing(device.torch_device, shapes.DTYPES[dtype])
        for name in names
    )
    return [name for name, reason in zip(names, missing, strict=True) if reason is None]


def guarantees(
    device: Cpu | Cuda,
    shape: shapes.Shape,
    dtype: str,
    kinds: Collection[str] = ("sync", "graph", "fullgraph"),
) -> Records:
    """Yield a record for each guarantee of `kinds`, implementation and kind of call."""
    torch_device = device.torch_device
    weights = {"row_weight": torch.rand(shape.batch, shape.tokens, device=torch_device)}
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "integer rows": ("index", {}),
        "mask, leading anchor": ("mask", {}),
        "mask, leading anchor and weights": ("mask", weights),
        "normalizer on the device": (
            "mask",
            {"normalizer": torch.full((), 100.0, device=torch_device)},
        ),
        "normalizer of the host": ("mask", {"normalizer": 100.0}),
        "sum": ("mask", {"reduction": "sum"}),
    }
    for impl in impls(device, dtype):
        for number, (item, (rows, options)) in enumerate(calls.items()):
            about = {"peer": f"ours-{impl}", "item": item, "selection": rows}
            case = shapes.case(shape, shapes.DTYPES[dtype], torch_device, rows)
            case.options = options
            function = partial(fused_pre_loss, impl=impl)
            if "sync" in kinds:
                yield {
                    "kind": "sync",
                    **about,
                    "outcome": outcome(partial(checks.sync, device, function, case)),
                }
            if isinstance(device, Cuda) and "graph" in kinds:
                yield {
                    "kind": "graph",
                    **about,
                    **_attempt(partial(_graph, device, function, case)),
                }
            # Each compilation takes seconds.
            if number < 2 and "fullgraph" in kinds:
                # On a CPU the host needs N of a mask. On a GPU it must work without any setting.
                on_cpu = isinstance(device, Cpu)
                with checks.output_shapes() if on_cpu else contextlib.nullcontext():
                    answer = outcome(partial(checks.fullgraph, function, case))
                yield {"kind": "fullgraph", **about, "outcome": answer}


def outcome(check: Callable[[], str]) -> str:
    """Return what a check returns, or the first line of what it raises."""
    return _attempt(lambda: {"outcome": check()})["outcome"]


def _attempt(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return check()
    except Exception as error:
        return {"outcome": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}


def _graph(device: Cpu | Cuda, function: Callable[..., Tensor], case: Case) -> dict[str, Any]:
    """Return the outcome and, if the graph captured the right gradients, the times of a replay and
    of the step itself."""
    step = baselines.step(function, case)
    outcome, replay = checks.graph(device, step, case)
    if outcome != checks.CAPTURED:
        return {"outcome": outcome}
    times = interleaved(device, {"graph": replay, "step": step}, 0.5)
    return {"outcome": outcome} | {
        f"{name}_ms": spread(samples)["median_ms"] for name, samples in times.items()
    }
