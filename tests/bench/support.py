"""Support of several tests of the measurements: records of runs that meet every goal, and the
fields of every record."""

import sys

from bench import gpu, gpu_goals, record, shapes

TINY = shapes.BY_NAME["tiny"]
# fields of every record
STAMP = {"device", "torch", "triton", "date", "commit", "source"}
PYTHON = [sys.executable, "-c"]
HANG = "import time; time.sleep(600)"


def results() -> list[dict]:
    stamp = {
        "device": "A",
        "torch": "2",
        "triton": "3",
        "date": "2026-01-02T03:04:05",
        "commit": "c",
        "group": "g",
    }
    about = {
        "kind": "loss",
        "shape": "tiny",
        "dtype": "bf16",
        "selection": "index",
        "n": 200,
        "d": 128,
        "m": 96,
        "z": 64,
        **stamp,
    }
    metrics = {"q1_ms": 1.0, "q3_ms": 4.0, "tflops": 12.0}
    ours = {
        "peer": "ours-torch",
        "median_ms": 1.5,
        "peak_mib": 30.0,
        "returned_mib": 10.0,
        "error_ratio": 1.0,
    }
    eager = {
        "peer": "eager",
        "median_ms": 3.0,
        "peak_mib": 110.0,
        "returned_mib": 10.0,
        "error_ratio": 1.0,
    }
    return [
        {**about, **metrics, **ours},
        {**about, **metrics, **eager},
        {**about, **metrics, "peer": "floor", "median_ms": 1.0},
        {**about, "peer": "ours-triton", "unavailable": "no GPU"},
    ]


def gpu_results() -> list[dict]:
    """Return records of a GPU that meets each goal: the time of ours is the floor's 2 ms × 1.05."""
    stamp = {
        "device": "G",
        "capability": "9.0",
        "torch": "2",
        "triton": "3",
        "date": "2026-01-02",
        "commit": "c",
    }
    lines = []

    def add(kind, **fields):
        lines.append({"kind": kind, "dtype": "bf16", "selection": "index", **stamp, **fields})

    def run(kind, shape, selection="index"):
        about = {"shape": shape.name, "n": shape.selected, "d": shape.d, "m": shape.m, "z": shape.z}
        times = {
            "floor": 2.0,
            "ours-blas": 2.1,
            "ours-triton": 2.2,
            "ours-fp8": 1.5,
            "eager": 4.0,
            "compile": 2.9,
        }
        times |= {"liger": 4.0, "viral": 7.0}
        for peer, ms in times.items():
            metrics = {"median_ms": ms, "q1_ms": ms, "q3_ms": ms, "tflops": 1 / ms}
            metrics |= (
                {"peak_mib": 300.0, "returned_mib": 100.0, "formula_mib": 210.0}
                if peer != "floor"
                else {}
            )
            group = f"{kind} {shape.name} {selection}"
            add(kind, peer=peer, **about, **metrics, selection=selection, group=group)

    for shape in shapes.GPU:
        run("loss", shape)
    run("loss", shapes.BY_NAME[gpu_goals.MAIN], "mask")
    for n in (256, 131072):
        run("sweep", shapes.Shape(f"n{n}-m4096", 1, n * 5 // 4, n, 4096, 4096, 4096, ""))
    for mib, ratio in ((32, 1.2), (64, 1.1), (512, 1.01)):
        add("workspace", shape=gpu_goals.MAIN, peer="ours-blas", item=mib, over_floor=ratio)
    item = "mask, leading anchor"
    for kind, outcome in (
        ("sync", "no sync"),
        ("graph", "captured, same gradients"),
        ("fullgraph", "no break"),
    ):
        add(kind, shape=gpu_goals.MAIN, peer="ours-triton", item=item, outcome=outcome)
    add("step", shape=gpu_goals.SMALL, peer="ours-blas", launches=14.0)
    add("firstcall", peer="ours-blas", item="cold cache", seconds=20.0)
    add("firstcall", peer="ours-blas", item="warm cache", seconds=1.0)
    add("training", item="llava15-7b", time_ratio=1.004, memory_ratio=1.003)
    return lines


def cpu_results() -> list[dict]:
    """Return records of a CPU that meets each goal."""
    stamp = {
        "device": "C",
        "threads": 2,
        "torch": "2",
        "triton": "3",
        "date": "2026-01-02",
        "commit": "c",
    }
    lines = []

    def add(kind, **fields):
        lines.append({"kind": kind, **stamp, **fields})

    def run(shape, dtype, selection, ours):
        times = {"ours-torch": ours, "eager": 4.0, "compile": 3.0, "compile-max": 2.5, "floor": 1.0}
        extras = {"ours-torch": 30.0, "eager": 100.0, "compile": 60.0, "compile-max": 50.0}
        for peer, ms in times.items():
            metrics = {"median_ms": ms, "error_ratio": 1.0, "outside_rule": None}
            metrics |= (
                {"peak_mib": 10.0 + extras[peer], "returned_mib": 10.0} if peer in extras else {}
            )
            metrics |= {"q1_ms": ms, "q3_ms": ms, "tflops": 1 / ms}
            about = {"shape": shape, "dtype": dtype, "selection": selection, "peer": peer}
            size = shapes.BY_NAME[shape]
            about |= {"n": size.selected, "d": size.d, "m": size.m, "z": size.z}
            add("loss", **about, **metrics, group=f"{shape} {dtype} {selection}")

    run("cpu-16k", "bf16", "index", 1.8)
    run("cpu-16k", "fp32", "index", 1.9)
    run("cpu-4k-encoder", "bf16", "index", 2.0)
    run("cpu-16k", "bf16", "mask", 2.25)
    run("cpu-16k", "fp16", "index", 3.0)
    run("cpu-small", "fp32", "index", 5.0)
    run("cpu-small", "bf16", "index", 5.2)
    for dtype in ("bf16", "fp32"):
        about = {
            "shape": "cpu-16k",
            "dtype": dtype,
            "selection": "index",
            "group": f"workspace {dtype}",
        }
        for item, ms, mib in ((2, 2.4, 12.0), (16, 1.8, 20.0), (256, 1.7, 250.0)):
            metrics = {
                "median_ms": ms,
                "over_floor": ms,
                "peak_mib": 10.0 + mib,
                "returned_mib": 10.0,
            }
            add("workspace", peer="ours-torch", item=item, **about, **metrics)
        for peer, ms, mib in (("eager", 4.0, 100.0), ("compile", 3.0, 60.0)):
            metrics = {
                "median_ms": ms,
                "over_floor": ms,
                "peak_mib": 10.0 + mib,
                "returned_mib": 10.0,
            }
            add("workspace", peer=peer, **about, **metrics)
        add("workspace", peer="floor", **about, median_ms=1.0, over_floor=1.0)
    add("training", item="smolvlm-256m", dtype="bf16", time_ratio=1.01, memory_ratio=1.015)
    return lines


def dry(stage, out):
    status = gpu.main(["--stage", stage, "--dry-run", "--out", str(out)])
    return status, record.load([out / "dry-run.jsonl"])
