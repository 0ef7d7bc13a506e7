"""Where a step's time goes, whether the host ever waits, and what the workspace buys.

python -m bench.profiling kernels      kernel times and launches of a step, for each peer (torch.profiler)
python -m bench.profiling syncs        the documented calls under PyTorch's sync debug mode, and as a CUDA graph
python -m bench.profiling workspace    time and peak memory over the bytes of a chunk's buffers
python -m bench.profiling once         one step between cudaProfilerStart and Stop, for ncu
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from pre_kernels import fused_pre_loss

from . import peers, record, report, shapes
from .check import Judge, oracle
from .device import Cpu, Cuda, current
from .measure import interleaved, spread

STEPS = 5
TOP = 25  # kernels kept of each peer
WAITS = ("Synchronize", "aten::item", "aten::_local_scalar_dense", "aten::nonzero")

Records = Iterator[dict[str, Any]]


def impl(device: Cpu | Cuda) -> str:
    return "triton" if device.kind == "cuda" else "torch"


def kernels(device: Cpu | Cuda, shape: shapes.Shape, dtype: str) -> Records:
    """Time and launches of each kernel per step (on a CPU: of each operator), and the calls that make the host wait."""
    case = shapes.case(shape, shapes.DTYPES[dtype], device.torch_device)
    on_gpu = device.kind == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for peer in peers.PEERS:
        if peer.name == "compile" or peer.missing(device.torch_device, shapes.DTYPES[dtype]):
            continue
        step = peers.step(peer.build(), case) if peer.build else peers.floor(case)
        for _ in range(2):
            step()
        device.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(STEPS):
                step()
            device.synchronize()
        waits, rows = {}, []
        for event in profile.key_averages():
            if any(word in event.key for word in WAITS):
                waits[event.key] = event.count / STEPS
            is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
            if is_kernel == on_gpu:
                time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                rows.append({"item": event.key[:160], "count": event.count / STEPS, "us": time / STEPS})
        rows.sort(key=lambda row: -row["us"])
        total = {"launches": sum(row["count"] for row in rows), "busy_us": sum(row["us"] for row in rows)}
        yield {"kind": "step", "peer": peer.name, **total, "waits": waits}
        for row in rows[:TOP]:
            yield {"kind": "kernel", "peer": peer.name, **row}


def syncs(device: Cpu | Cuda, shape: shapes.Shape, dtype: str) -> Records:
    """Whether each call that promises no host sync keeps the promise, and whether a CUDA graph can hold it."""
    place = device.torch_device
    wide = torch.float32
    weights = {"row_weight": torch.rand(shape.batch, shape.tokens, device=place)}
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "mask, leading anchor": ("mask", {}),
        "integer rows": ("index", {}),
        "mask, leading anchor and weights": ("mask", weights),
        "normalizer on the device": ("mask", {"normalizer": torch.full((), 100.0, dtype=wide, device=place)}),
        "normalizer of the host": ("mask", {"normalizer": 100.0}),
        "sum": ("mask", {"reduction": "sum"}),
    }
    for name, (rows, options) in calls.items():
        case = shapes.case(shape, shapes.DTYPES[dtype], place, rows)
        case.options = options
        step = peers.step(partial(fused_pre_loss, impl=impl(device)), case)
        step()  # compiles
        device.synchronize()
        outcome = "no sync"
        try:
            with device.syncs_forbidden():
                step()
        except RuntimeError as error:
            outcome = str(error).splitlines()[0][:300]
        device.synchronize()
        yield {"kind": "sync", "item": name, "outcome": outcome}
        if isinstance(device, Cuda):
            yield {"kind": "graph", "item": name, **_graph(device, step)}


def _graph(device: Cuda, step: peers.Step) -> dict[str, Any]:
    """Capture and replay a step: its gradients must be those of the step itself."""
    wanted = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {"outcome": str(error).splitlines()[0][:300]}
    same = all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    if not same:
        return {"outcome": "captured, but its gradients differ"}
    times = interleaved(device, {"graph": graph.replay, "step": step}, 0.5)
    medians = {f"{name}_ms": spread(samples)["median_ms"] for name, samples in times.items()}
    return {"outcome": "captured, same gradients", **medians}


def workspace(device: Cpu | Cuda, shape: shapes.Shape, dtype: str) -> Records:
    """Time and peak over the workspace, for both implementations where they run; sizes take turns."""
    case = shapes.case(shape, shapes.DTYPES[dtype], device.torch_device)
    judge = Judge(case)
    steps: dict[tuple[str, int], Callable[[], Any]] = {}
    for name in dict.fromkeys(("torch", impl(device))):
        for mib in (8, 16, 32, 64, 128, 256, 512, 1024):
            function = partial(fused_pre_loss, impl=name, workspace=mib << 20)
            verdict = judge(function)
            if verdict.failure:
                yield {"kind": "workspace", "peer": f"ours-{name}", "item": mib, "failed": verdict.failure}
            else:
                steps[name, mib] = peers.step(function, case)
    del judge
    times = interleaved(device, {f"{name} {mib}": step for (name, mib), step in steps.items()}, 20.0)
    for (name, mib), step in steps.items():
        peak = dict(zip(("peak_mib", "returned_mib"), device.peak(step), strict=True)) if device.kind == "cuda" else {}
        yield {"kind": "workspace", "peer": f"ours-{name}", "item": mib, **spread(times[f"{name} {mib}"]), **peak}


def once(device: Cpu | Cuda, shape: shapes.Shape, dtype: str) -> Records:
    case: oracle.Case = shapes.case(shape, shapes.DTYPES[dtype], device.torch_device)
    step = peers.step(partial(fused_pre_loss, impl=impl(device)), case)
    for _ in range(2):
        step()
    device.synchronize()
    if device.kind == "cuda":
        torch.cuda.profiler.start()
    step()
    device.synchronize()
    if device.kind == "cuda":
        torch.cuda.profiler.stop()
    yield from ()


WHAT: dict[str, Callable[[Cpu | Cuda, shapes.Shape, str], Records]] = {
    "kernels": kernels,
    "syncs": syncs,
    "workspace": workspace,
    "once": once,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--shape", choices=shapes.BY_NAME, default="llava15-7b-sft", metavar="SHAPE")
    parser.add_argument("--dtype", choices=shapes.DTYPES, default="bf16")
    parser.add_argument("--out", help="folder of the result file; else GPU_OUT, else bench/results")
    arguments = parser.parse_args(argv)

    device = current()
    path = record.file(record.folder(arguments.out), device)
    about = {"shape": arguments.shape, "dtype": arguments.dtype, **record.stamp(device)}
    lines = []
    for line in WHAT[arguments.what](device, shapes.BY_NAME[arguments.shape], arguments.dtype):
        record.append(path, line | about)
        lines.append(line)
    for kind in dict.fromkeys(line["kind"] for line in lines):
        print(report.markdown(report.plain_table([line for line in lines if line["kind"] == kind])), "\n")


if __name__ == "__main__":
    main()
