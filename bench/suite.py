"""Measurement of one shape: check ours and every baseline, time those that pass side by side, and
read their peak memory.

python -m bench.suite cpu-16k bf16
python -m bench.suite llava15-7b-sft bf16 --rows mask --peers floor eager ours-triton --seconds 5
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pre_kernels import screen
from pre_kernels.check import memory as resident
from pre_kernels.check.cases import formula, needed
from pre_kernels.check.device import FLUSH, MIB, Cpu, Cuda, current
from pre_kernels.check.rule import Case, Judge
from pre_kernels.check.timing import interleaved, spread

from . import baselines, kept, pace, peak_memory, record, shapes, shown, where

STEP_LIMIT = (
    "on a CPU, leave out a baseline whose step takes more than this many seconds (default: "
    f"{pace.STEP_LIMIT:g})"
)

Records = Iterator[dict[str, Any]]


def reason(error: BaseException) -> str:
    """Return the first line of an error."""
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
    hot: bool = False,
    step_limit: float = pace.STEP_LIMIT,
    tell: pace.Tell = pace.silent,
) -> Records:
    """Yield records of each baseline as they come, judged in the order of `names` (else all): its
    verdict, its times after the minimum of rounds, and its times after all rounds. A later record
    of a baseline replaces an earlier one, so an early end leaves the results so far. A baseline
    that is unavailable or fails its check has "unavailable" or "failed" instead of times. `hot`
    leaves the L2 cache as the step before left it; such records have their own kind. On a CPU a
    baseline is "unavailable" if a step takes more than `step_limit` seconds. `tell` is told what
    begins."""
    chosen = [baselines.BY_NAME[name] for name in names] or baselines.BASELINES
    torch_dtype = shapes.DTYPES[dtype]
    torch_device = device.torch_device
    stamp = record.stamp(device)
    size = {"rows": shape.rows, "n": shape.selected, "d": shape.d, "m": shape.m, "z": shape.z}
    kind = "hot" if hot else "loss"
    # One run is one group. Times are only divided by times that were measured beside them, or
    # beside the same floor.
    which = f"{shape.name} {dtype} {rows}"
    group = f"{stamp.get('run', stamp['date'])} {kind} {which}"
    about = {
        "kind": kind,
        "shape": shape.name,
        **size,
        "dtype": dtype,
        "selection": rows,
        "group": group,
    }
    results: dict[str, dict[str, Any]] = {baseline.name: {} for baseline in chosen}

    def told(name: str) -> dict[str, Any]:
        return {**about, "peer": name, **results[name], **stamp}

    def slow(baseline: baselines.Baseline) -> str | None:
        if not baseline.any_head and (shape.depth, shape.norm) != (2, None):
            return "it has heads of two layers alone, without a norm"
        if baseline.missing(torch_device, torch_dtype):
            return None
        return pace.too_slow(baseline, shape, dtype, device, step_limit)

    tell(f"{which}: making its inputs", 0.0)
    lack = too_large(shape, device)
    if lack is None and (reference_is := slow(baselines.BY_NAME["eager"])):
        lack = f"the error rule needs eager: {reference_is}"
    if lack:
        for name in results:
            results[name] = {"unavailable": lack}
            yield told(name)
        return
    case = shapes.case(shape, torch_dtype, torch_device, rows)
    steps: dict[str, baselines.Step] = {}
    judges: dict[str, Judge] = {}
    # Without a reset a second shape would be compiled for any size. Dynamo is not imported for
    # this, since that takes seconds.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    for baseline in chosen:
        compiling = " and compiling" if baseline.compiles else ""
        tell(f"{which}: checking{compiling} {baseline.name}", pace.CHECK + baseline.compiles)
        if reason_slow := slow(baseline):
            results[baseline.name], step = {"unavailable": reason_slow}, None
        else:
            results[baseline.name], step = judged(baseline, case, judges)
        if step is not None:
            steps[baseline.name] = step
        if results[baseline.name]:
            yield told(baseline.name)
    # The float64 gradients would take memory from what is measured.
    judges.clear()

    if hot and isinstance(device, Cuda):
        # With an empty buffer nothing is written between samples.
        device.scratch = torch.empty(0, device=torch_device)
    extra: dict[str, dict[str, Any]] = {}
    seconds = pace.SECONDS[device.kind] if seconds is None else seconds
    tell(f"{which}: timing {len(steps)} in turn", seconds)
    for samples in staged(device, steps, seconds):
        # The stamp is taken again, with the clocks right after work.
        stamp = record.stamp(device)
        for name, milliseconds in samples.items():
            results[name] |= timed(milliseconds, samples.get("floor"))
            results[name]["tflops"] = shape.flop / results[name]["median_ms"] / 1e9
            results[name]["all_ms"] = [round(x, 5) for x in milliseconds]
            results[name] |= extra.get(name, {})
            yield told(name)
        for name in steps if not extra else ():
            tell(f"{which}: memory of {name}", pace.PEAK)
            extra[name] = _beside(
                device, shape, dtype, name, rows, steps[name], with_memory and not hot
            )
        tell(f"{which}: timing {len(steps)} in turn", 0.0)


def judged(
    baseline: baselines.Baseline, case: Case, judges: dict[str, Judge]
) -> tuple[dict[str, Any], baselines.Step | None]:
    """Return what is known of a baseline before it is timed, and its step if it is to be timed.
    `judges` keeps the judge of each case."""
    device = case.tensors["hidden"].device
    dtype = case.product_dtype
    if missing := baseline.missing(device, dtype):
        return {"unavailable": missing}, None
    if baseline.build is None:
        return {}, baselines.floor(case)
    own = baselines.own_case(baseline, case)
    key = f"{baseline.options}, biases {baseline.biases}"
    if key not in judges:
        judges[key] = Judge(own)
    try:
        function = baseline.build()
        verdict = judges[key](function, baseline.gate)
    except Exception as error:
        return {"failed" if baseline.ours else "unavailable": reason(error)}, None
    if verdict.wrong or (baseline.ours and verdict.failure):
        return {"failed": verdict.failure}, None
    result = {"error_ratio": verdict.error_ratio, "outside_rule": verdict.failure}
    if baseline.gate is not None:
        rule = f"relative rms error {verdict.relative:.3f} ≤ {baseline.gate}"
        result |= {"own_rule": rule, "outside_rule": f"judged by a rule of its own: {rule}"}
    return result, baselines.step(function, own)


def staged(
    device: Cpu | Cuda, steps: Mapping[Any, baselines.Step], seconds: float
) -> Iterator[dict[Any, list[float]]]:
    """Yield the samples of each step, which take turns: those of the minimum of rounds, then all
    that `seconds` allow."""
    start = time.monotonic()
    samples = interleaved(device, steps, 0.0)
    left = seconds - (time.monotonic() - start)
    yield samples
    more = interleaved(device, steps, left, least=0)
    yield {name: known + more[name] for name, known in samples.items()}


def timed(milliseconds: list[float], floor: list[float] | None) -> dict[str, float]:
    """Return median and quartiles, and the median of the floor that was sampled beside it, if
    any."""
    return {**spread(milliseconds), **({"floor_ms": spread(floor)["median_ms"]} if floor else {})}


def too_large(shape: shapes.Shape, device: Cpu | Cuda) -> str | None:
    """Return why a shape is too large to judge, by an estimate of its float64 arithmetic. None if
    it fits."""
    need = needed(shape, torch.float64, FLUSH)
    free = device.free()
    if free is None or need <= free:
        return None
    return f"judging it takes {need / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free"


def _beside(
    device: Cpu | Cuda,
    shape: shapes.Shape,
    dtype: str,
    name: str,
    rows: str,
    step: baselines.Step,
    with_memory: bool,
) -> dict[str, Any]:
    """Return what is measured of a step besides its time: peak memory, the memory by design, and
    the time of the host."""
    enqueue = device.enqueue_us(step)
    result = {} if enqueue is None else {"enqueue_us": enqueue}
    if baselines.BY_NAME[name].ours:
        designed = formula(
            shape, shapes.DTYPES[dtype], name.removeprefix("ours-"), device.torch_device
        )
        result["formula_mib"] = designed / MIB
    if not with_memory or baselines.BY_NAME[name].build is None:
        return result
    return result | peak(device, step, shape.name, dtype, name, rows)


def peak(device: Cpu | Cuda, step: baselines.Step, *named: Any) -> dict[str, Any]:
    """Return peak and returned MiB of a step, or why they are not known. On a CPU a fresh process
    finds them by the arguments of `peak_memory.peak`."""
    try:
        if isinstance(device, Cuda):
            most, returned = device.peak(step)
        elif missing := resident.missing():
            return {"memory_unavailable": missing}
        else:
            most, returned = peak_memory.peak(*named)
    except RuntimeError as error:
        return {"memory_unavailable": reason(error)}
    return {"peak_mib": most, "returned_mib": returned}


def main(argv: Sequence[str] | None = None) -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("shape", choices=shapes.BY_NAME, metavar="SHAPE", help=", ".join(shapes.BY_NAME))
    add("dtype", choices=shapes.DTYPES)
    add("--rows", nargs="+", choices=shapes.ROWS, default=["index"], help="how the rows are given")
    add(
        "--peers",
        nargs="+",
        choices=baselines.BY_NAME,
        metavar="PEER",
        default=[],
        help="measure these, in this order (default: all)",
    )
    add("--seconds", type=float, help="seconds of sampling")
    add("--hot", action="store_true", help="without a cold L2 cache before each step")
    add("--step-limit", type=float, default=pace.STEP_LIMIT, help=STEP_LIMIT)
    where.add_options(add)
    arguments = parser.parse_args(argv)

    device = current()
    run = kept.start(arguments, device, parser.error)
    shape = shapes.BY_NAME[arguments.shape]
    names = arguments.peers or list(baselines.BY_NAME)
    predicted = pace.predicted(names, device, arguments.seconds)
    with run.measuring([predicted] * len(arguments.rows)) as progress:
        for number, rows in enumerate(arguments.rows):
            progress.part(number)
            for line in measure(
                shape,
                arguments.dtype,
                device,
                names,
                arguments.seconds,
                rows=rows,
                hot=arguments.hot,
                step_limit=arguments.step_limit,
                tell=progress.tell,
            ):
                run.add(line)
    records = record.latest(run.records)
    print(*shown.loss(records), "", *shown.wrapped(run.told()), sep="\n")
    failed = any("failed" in line and baselines.BY_NAME[line["peer"]].ours for line in records)
    return run.status or int(failed)


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
