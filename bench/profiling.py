"""Where the time of a step goes, whether the host waits, and what a larger workspace saves.

python -m bench.profiling ceilings     GB/s of a copy on the device, TFLOP/s of a large matmul of
                                       random numbers
python -m bench.profiling kernels      kernel times and launches of a step, for each baseline
                                       (torch.profiler)
python -m bench.profiling syncs        the documented calls: host syncs, as a CUDA graph
python -m bench.profiling fullgraph    the same under torch.compile
python -m bench.profiling workspace    time ÷ floor and peak memory over the bytes of a chunk's
                                       buffers
python -m bench.profiling workspace --dtype bf16 fp32
                                       on a CPU: that curve, with eager and torch.compile
python -m bench.profiling firstcall    seconds of the first step of a process, with Triton's cache
                                       empty and filled
python -m bench.profiling once         one step between cudaProfilerStart and Stop, for ncu
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pre_kernels import fused_pre_loss, screen
from pre_kernels.check.device import Cpu, Cuda, current
from pre_kernels.check.rule import Case, Judge
from pre_kernels.check.timing import interleaved, spread

from . import ROOT, baselines, kept, record, shapes, suite, tables, where
from .gpu_goals import KEPT
from .gpu_stages import module
from .kept_guarantees import guarantees, impls

# MiB of workspace in a sweep
MIBS = {"cuda": (8, 16, 32, 64, 128, 256, 512, 1024), "cpu": (2, 4, 8, 16, 32, 64, 128, 256)}
# baselines that are measured beside the sweep
BESIDE: dict[str, tuple[str, ...]] = {"cuda": (), "cpu": ("eager", "compile")}
SHAPE = {"cuda": "llava15-7b-sft", "cpu": "cpu-16k"}
STEPS = 5
# This many kernels of each baseline are kept, the slowest ones.
TOP = 25
WAITS = ("Synchronize", "aten::item", "aten::_local_scalar_dense", "aten::nonzero")

Records = Iterator[dict[str, Any]]


def ceilings(device: Cpu | Cuda, dtype: str) -> Records:
    """Yield the limits of the device. The numbers are random: a matmul of zeros needs less power,
    and so less time."""
    if failure := _no_launch(device):
        yield {"kind": "ceiling", "item": "launch", "failed": failure}
    torch_device = device.torch_device
    big, side = (1 << 31, 8192) if device.kind == "cuda" else (1 << 22, 128)
    source = torch.empty(big, dtype=torch.int8, device=torch_device)
    to = torch.empty_like(source)
    a, b = (
        torch.randn(side, side, device=torch_device, dtype=shapes.DTYPES[dtype]) for _ in range(2)
    )
    out = torch.empty_like(a)
    steps = {"copy": lambda: to.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
    for item, samples in interleaved(device, steps, 2.0).items():
        metrics = spread(samples)
        rate = 2 * big / 1e6 if item == "copy" else 2 * side**3 / 1e9
        unit = "gb_per_s" if item == "copy" else "tflops"
        yield {"kind": "ceiling", "item": item, unit: rate / metrics["median_ms"], **metrics}


def _no_launch(device: Cpu | Cuda) -> str | None:
    """Return why no Triton kernel can start, which needs a C compiler and Python's headers. None if
    one starts."""
    if device.kind == "cpu":
        return None
    try:
        from pre_kernels.fused.kernels.rows import invert

        invert(torch.arange(4, device=device.torch_device), 4)
        device.synchronize()
    except Exception as error:
        return suite.reason(error)
    return None


def kernels(
    device: Cpu | Cuda, shape: shapes.Shape, dtype: str, names: Iterable[str] = ()
) -> Records:
    """Yield time and launches of each kernel per step (on a CPU: of each operator), and the calls
    that make the host wait."""
    case = shapes.case(shape, shapes.DTYPES[dtype], device.torch_device)
    on_gpu = device.kind == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    quick = [
        entry.name for entry in baselines.BASELINES if entry.max_plan_entries > baselines.COMPILED
    ]
    for name in names or quick:
        baseline = baselines.BY_NAME[name]
        if baseline.missing(device.torch_device, shapes.DTYPES[dtype]):
            continue
        try:
            step = (
                baselines.step(baseline.build(), baselines.own_case(baseline, case))
                if baseline.build
                else baselines.floor(case)
            )
            for _ in range(2):
                step()
            device.synchronize()
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(STEPS):
                    step()
                device.synchronize()
        except Exception as error:
            yield {"kind": "step", "peer": name, "failed": suite.reason(error)}
            continue
        waits: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        for event in profile.key_averages():
            if any(word in event.key for word in WAITS):
                waits[event.key] = event.count / STEPS
            is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
            if is_kernel == on_gpu:
                time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                rows.append(
                    {"item": event.key[:160], "count": event.count / STEPS, "us": time / STEPS}
                )
        rows.sort(key=lambda row: -row["us"])
        total = {
            "launches": sum(row["count"] for row in rows),
            "busy_us": sum(row["us"] for row in rows),
        }
        yield {"kind": "step", "peer": name, **total, "waits": waits}
        for row in rows[:TOP]:
            yield {"kind": "kernel", "peer": name, **row}


def workspace(
    device: Cpu | Cuda,
    shape: shapes.Shape,
    dtype: str,
    names: Sequence[str] = (),
    mibs: Sequence[int] = (),
) -> Records:
    """Yield time and peak memory over the workspace, for all implementations that run. Sizes take
    turns with the floor, and on a CPU with the baselines that take no workspace, whose records have
    no "item"."""
    if reason := suite.too_large(shape, device):
        yield {"kind": "workspace", "unavailable": reason}
        return
    case = shapes.case(shape, shapes.DTYPES[dtype], device.torch_device)
    judges: dict[str, Judge] = {}
    stamp = record.stamp(device)
    group = f"{stamp.get('run', stamp['date'])} workspace {shape.name} {dtype}"
    ours = [f"ours-{name}" for name in dict.fromkeys(("torch", *impls(device, dtype)))]
    plan: list[tuple[str, int | None]] = [
        (name, mib) for name in ours for mib in mibs or MIBS[device.kind]
    ]
    plan = [
        entry
        for entry in plan + [(name, None) for name in BESIDE[device.kind]]
        if not names or entry[0] in names
    ]
    steps: dict[tuple[str, int | None], baselines.Step] = {}
    known: dict[tuple[str, int | None], dict[str, Any]] = {("floor", None): {}}

    def told(name: str, mib: int | None) -> dict[str, Any]:
        about = {"kind": "workspace", "group": group, "peer": name, "selection": "index"}
        return {**about, **({} if mib is None else {"item": mib}), **known[name, mib]}

    for name, mib in plan:
        baseline = baselines.BY_NAME[name]
        if mib is not None and baseline.build is not None:
            build = partial(partial, baseline.build(), workspace=mib << 20)
            baseline = replace(baseline, build=build)
        known[name, mib], step = suite.judged(baseline, case, judges)
        if step is None:
            yield told(name, mib)
        else:
            steps[name, mib] = step
    # The float64 gradients would take memory from what is measured.
    judges.clear()
    peaks = False
    for times in suite.staged(device, {**steps, ("floor", None): baselines.floor(case)}, 20.0):
        for entry, samples in times.items():
            known[entry] |= suite.timed(samples, times["floor", None])
            known[entry]["over_floor"] = known[entry]["median_ms"] / known[entry]["floor_ms"]
            yield told(*entry)
        for entry, step in steps.items() if not peaks else ():
            known[entry] |= suite.peak(device, step, shape.name, dtype, entry[0], "index", entry[1])
        peaks = True


def firstcall(device: Cpu | Cuda, shape: shapes.Shape, dtype: str) -> Records:
    """Yield the seconds of a first call in fresh processes. Imports, inputs and the device are
    ready; kernels are compiled, or read from the cache."""
    for name in impls(device, dtype):
        with tempfile.TemporaryDirectory() as cache:
            for item in ("cold cache", "warm cache"):
                size = ["--shape", shape.name, "--dtype", dtype]
                # It keeps no record.
                command = module("bench.profiling", "first", *size, "--results", cache)
                environment = os.environ | {"TRITON_CACHE_DIR": cache, "BENCH_IMPL": name}
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
                )
                about = {"kind": "firstcall", "peer": f"ours-{name}", "item": item}
                if done.returncode:
                    yield about | {"failed": done.stderr.strip()[-300:]}
                else:
                    yield about | json.loads(done.stdout.splitlines()[-1])


def first(device: Cpu | Cuda, shape: shapes.Shape, dtype: str) -> Records:
    """Run what `firstcall` measures, in a process of its own."""
    case = shapes.case(shape, shapes.DTYPES[dtype], device.torch_device)
    step = baselines.step(partial(fused_pre_loss, impl=os.environ["BENCH_IMPL"]), case)
    device.synchronize()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds[0], "next_seconds": seconds[1]}))
    yield from ()


def once(device: Cpu | Cuda, shape: shapes.Shape, dtype: str) -> Records:
    case: Case = shapes.case(shape, shapes.DTYPES[dtype], device.torch_device)
    step = baselines.step(fused_pre_loss, case)
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


WHAT: dict[str, Callable[..., Records]] = {
    "ceilings": lambda device, shape, dtype: ceilings(device, dtype),
    "kernels": kernels,
    "syncs": partial(guarantees, kinds=("sync", "graph")),
    "fullgraph": partial(guarantees, kinds=("fullgraph",)),
    "workspace": workspace,
    "firstcall": firstcall,
    "first": first,
    "once": once,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("what", choices=WHAT)
    add("--shape", choices=shapes.BY_NAME, metavar="SHAPE", help=f"default, by the device: {SHAPE}")
    add("--dtype", nargs="+", choices=shapes.DTYPES, default=["bf16"])
    add(
        "--peers",
        nargs="+",
        choices=baselines.BY_NAME,
        metavar="PEER",
        help="baselines of kernels and workspace (default: all)",
    )
    add(
        "--mib",
        nargs="+",
        type=int,
        help=f"sizes of the workspace (default, by the device: {MIBS})",
    )
    where.add_options(add)
    arguments = parser.parse_args(argv)
    device = current()
    run = kept.start(arguments, device, parser.error)
    shape = shapes.BY_NAME[arguments.shape or SHAPE[device.kind]]
    choices = {"names": arguments.peers, "mibs": arguments.mib}
    options = {name: value for name, value in choices.items() if value is not None}
    run.every(
        line | {"shape": shape.name, "dtype": dtype, **record.stamp(device)}
        for dtype in arguments.dtype
        for line in WHAT[arguments.what](device, shape, dtype, **options)
    )
    lines = run.records
    for kind in dict.fromkeys(line["kind"] for line in lines):
        print(
            tables.markdown(tables.plain_table([line for line in lines if line["kind"] == kind])),
            "\n",
        )
    for line in run.told():
        print(line)
    broken = any(
        "failed" in line or line.get("outcome") != KEPT.get(line["kind"]) for line in lines
    )
    return run.status or int(broken)


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
