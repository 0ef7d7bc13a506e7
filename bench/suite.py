"""One shape measured: check every peer, time those that pass side by side, read their peak memory.

python -m bench.suite cpu-16k bf16
python -m bench.suite llava15-7b-sft bf16 --rows mask --peers ours-triton eager floor --seconds 5 --out results
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pre_kernels.check import memory as resident
from pre_kernels.check.cases import formula
from pre_kernels.check.device import MIB, Cpu, Cuda, current
from pre_kernels.check.rule import Judge
from pre_kernels.check.timing import interleaved, spread

from . import memory, peers, record, report, shapes

SECONDS = {"cpu": 8.0, "cuda": 5.0}  # of sampling a shape, beyond the least of rounds


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def measure(
    shape: shapes.Shape,
    dtype: str,
    device: Cpu | Cuda,
    names: Iterable[str] = (),
    seconds: float | None = None,
    with_memory: bool = True,
    rows: str = "index",
) -> list[dict[str, Any]]:
    """A record of each peer (of `names`, else all). One that is unavailable or fails its check has "unavailable" or
    "failed" instead of figures."""
    chosen = [peer for peer in peers.PEERS if not names or peer.name in names]
    torch_dtype, place = shapes.DTYPES[dtype], device.torch_device
    case = shapes.case(shape, torch_dtype, place, rows)
    results: dict[str, dict[str, Any]] = {peer.name: {} for peer in chosen}
    steps: dict[str, peers.Step] = {}
    judges: dict[str, Judge] = {}
    torch.compiler.reset()  # else a second shape would be compiled for dynamic sizes

    for peer in chosen:
        reason = peer.missing(place, torch_dtype)
        if reason is not None:
            results[peer.name] = {"unavailable": reason}
            continue
        if peer.build is None:
            steps[peer.name] = peers.floor(case)
            continue
        own, options = peers.own_case(peer, case), str(peer.options)
        if options not in judges:
            judges[options] = Judge(own)
        try:
            function = peer.build()
            verdict = judges[options](function, peer.gate)
        except Exception as error:
            results[peer.name] = {"failed" if peer.ours else "unavailable": _reason(error)}
            continue
        if verdict.wrong or (peer.ours and verdict.failure):
            results[peer.name] = {"failed": verdict.failure}
            continue
        results[peer.name] = {"error_ratio": verdict.error_ratio, "outside_rule": verdict.failure}
        if peer.gate is not None:
            rule = f"relative rms error {verdict.relative:.3f} ≤ {peer.gate}"
            results[peer.name] |= {"own_rule": rule, "outside_rule": f"judged by a rule of its own: {rule}"}
        steps[peer.name] = peers.step(function, own)
    judges.clear()  # float64 gradients: they would crowd out what is measured

    samples = interleaved(device, steps, SECONDS[device.kind] if seconds is None else seconds)
    for name, milliseconds in samples.items():
        results[name] |= spread(milliseconds)
        results[name]["tflops"] = shape.flop / results[name]["median_ms"] / 1e9
        results[name]["all_ms"] = [round(x, 5) for x in milliseconds]
        if with_memory and peers.BY_NAME[name].build is not None:
            results[name] |= _memory(device, shape, dtype, name, rows, steps[name])
        if peers.BY_NAME[name].ours:
            results[name]["formula_mib"] = formula(shape, torch_dtype, peers.workspace(name, place)) / MIB

    stamp = record.stamp(device)
    size = {"rows": shape.rows, "n": shape.selected, "d": shape.d, "m": shape.m, "z": shape.z}
    # one run, one group: what is divided by another peer's time was measured beside it
    group = f"{stamp['date']} {shape.name} {dtype} {rows}"
    about = {"kind": "loss", "shape": shape.name, **size, "dtype": dtype, "selection": rows, "group": group}
    return [{**about, "peer": name, **result, **stamp} for name, result in results.items()]


def _memory(
    device: Cpu | Cuda, shape: shapes.Shape, dtype: str, name: str, rows: str, step: peers.Step
) -> dict[str, Any]:
    if isinstance(device, Cpu):
        if reason := resident.missing():
            return {"memory_unavailable": reason}
        try:
            peak, returned = memory.peak(shape.name, dtype, name, rows)
        except RuntimeError as error:
            return {"memory_unavailable": _reason(error)}
    else:
        peak, returned = device.peak(step)
    return {"peak_mib": peak, "returned_mib": returned}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=shapes.BY_NAME, metavar="SHAPE", help=", ".join(shapes.BY_NAME))
    parser.add_argument("dtype", choices=shapes.DTYPES)
    parser.add_argument("--rows", choices=shapes.ROWS, default="index", help="how the rows are given")
    parser.add_argument("--peers", nargs="+", choices=peers.BY_NAME, default=[], help="all if not given")
    parser.add_argument("--seconds", type=float, help="of sampling")
    parser.add_argument("--out", help="folder of the result file; else GPU_OUT, else bench/results")
    arguments = parser.parse_args(argv)

    device = current()
    path = record.file(record.folder(arguments.out), device)
    records = measure(
        shapes.BY_NAME[arguments.shape],
        arguments.dtype,
        device,
        arguments.peers,
        seconds=arguments.seconds,
        rows=arguments.rows,
    )
    for line in records:
        record.append(path, line)
    print(report.markdown(report.loss_table(records)))
    for line in report.refusals(records):
        print(line)
    return any("failed" in line and peers.BY_NAME[line["peer"]].ours for line in records)


if __name__ == "__main__":
    raise SystemExit(main())
