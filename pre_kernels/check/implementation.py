"""The checks of one implementation, in their own process: `python -m
pre_kernels.check.implementation IMPL WIDTH ROWS DTYPE`.

It prints one JSON object per line: {"begin": check}, then the check's finding; {"ready": true} when
the small checks are done and it waits for a line of input, because the rest needs the device for
itself; {"done": true} at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pre_kernels import fused_pre_loss, reference
from pre_kernels.loss import fp8_unavailable, unavailable

from . import guarantees, memory
from .cases import DTYPES, Shape, case, floor, formula, needed, step, workspace
from .device import FLUSH, MIB, Cpu, Cuda, current
from .rule import Case, Judge
from .timing import interleaved, spread

# An implementation whose precision no error rule can hold may have this relative rms error.
GATES = {"fp8": 0.1}
# Sampling takes this many seconds.
SECONDS = {"cpu": 3.0, "cuda": 2.0}
NAMES = (
    "error, small case",
    "no host sync",
    "CUDA graph, other rows",
    "torch.compile, fullgraph",
    "error, real size",
    "peak memory",
    "time",
)


class Finding(NamedTuple):
    """The outcome of a check: "pass", "fail" or "skip", or "info" where nothing is guaranteed."""

    outcome: str
    says: str
    values: dict[str, Any] = {}  # noqa: RUF012


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unfit(impl: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Return why an implementation cannot be checked there, or None if it can."""
    if impl == "torch":
        return None
    reason = unavailable(device, dtype)
    if reason or impl != "fp8":
        return reason
    if device.type == "cpu":
        return "float8 products need a GPU"
    if dtype != torch.bfloat16:
        return "float8 products need --dtype bf16"
    return fp8_unavailable(device) or (
        f"--width: got {width}, want at most 8192" if width > 8192 else None
    )


class Checks:
    """The checks of an implementation. Each method returns its finding or raises."""

    def __init__(self, impl: str, width: int, rows: int, dtype: str) -> None:
        self.impl = impl
        self.device = current()
        self.dtype = DTYPES[dtype]
        self.argv = (impl, str(width), str(rows), dtype)
        options: dict[str, Any] = (
            {"impl": "blas", "precision": "fp8"} if impl == "fp8" else {"impl": impl}
        )
        self.function = partial(fused_pre_loss, **options)
        self.timed = impl == "torch" or not interpreted()
        # Both shapes have the same width, so that they share their compiled kernels.
        self.small = Shape("small", 3, 101, 67, width, width, width, "ragged")
        self.real = Shape(
            "real", 1, -(-rows * 16 // 9), rows, width, width, width, "9 of 16 rows, as of images"
        )
        if not self.timed:
            self.small = Shape("tiny", 2, 21, 13, 64, 64, 64, "for the interpreter")
        self.failed = False

    def calls(self) -> dict[str, Case]:
        """Return the small calls that make no host sync."""
        place = self.device.torch_device
        calls = {"integer rows": case(self.small, self.dtype, place)}
        if self.impl != "torch":  # "torch" waits for the count of a mask.
            weighted = case(self.small, self.dtype, place, "mask")
            weighted.options = {
                "row_weight": torch.rand(self.small.batch, self.small.tokens, device=place)
            }
            calls |= {
                "mask": case(self.small, self.dtype, place, "mask"),
                "mask and weights": weighted,
            }
        return calls

    def small_error(self) -> Finding:
        """Check a mask with gaps, with and without weights, and indices in any order."""
        if short := self._short(self.small, torch.float64):
            return short
        place = self.device.torch_device
        generator = torch.Generator().manual_seed(1)
        mask = torch.rand(self.small.batch, self.small.tokens, generator=generator) < 0.7
        index = torch.randperm(self.small.rows, generator=generator)[: int(mask.sum())]
        weight = (0.1 + torch.rand(mask.shape, generator=generator)).to(place)
        calls: dict[str, tuple[Tensor, dict[str, Any]]] = {
            "mask": (mask, {}),
            "mask and weights": (mask, {"row_weight": weight}),
            "integer rows": (index, {}),
        }
        findings = []
        for name, (rows, options) in calls.items():
            call = case(self.small, self.dtype, place)
            call.rows = rows.to(place)
            call.options = options
            findings.append(self._error(call, f"{name}: "))
        return next(
            (finding for finding in findings if finding.outcome == "fail"),
            max(findings, key=lambda finding: finding.values["share"]),
        )

    def real_error(self) -> Finding:
        if short := self._short(self.real, torch.float64):
            return short
        return self._error(case(self.real, self.dtype, self.device.torch_device))

    def _error(self, call: Case, of: str = "") -> Finding:
        gate = GATES.get(self.impl)
        verdict = Judge(call)(self.function, gate)
        rule = f"a relative rms error of {gate}" if gate else "the rule"
        says = of + verdict.failure if verdict.failure else f"{verdict.share:.2f} × {rule}"
        return Finding("fail" if verdict.failure else "pass", says, verdict._asdict())

    def sync(self) -> Finding:
        return self._each(
            lambda call: guarantees.sync(self.device, self.function, call), guarantees.NO_SYNC
        )

    def graph(self) -> Finding:
        return self._each(
            lambda call: guarantees.graph(self.device, step(self.function, call), call)[0],
            guarantees.CAPTURED,
        )

    def _each(self, check: Callable[[Case], str], wanted: str) -> Finding:
        """Check a guarantee of the GPU on each of the small calls."""
        if isinstance(self.device, Cpu):
            return Finding("skip", "not on a CPU")
        if short := self._short(self.small, self.dtype):
            return short
        calls = self.calls()
        for name, call in calls.items():
            outcome = _named(name, check, call)
            if outcome != wanted:
                return Finding("fail", f"{name}: {outcome}")
        return Finding("pass", ", ".join(calls))

    def fullgraph(self) -> Finding:
        """Check one call for graph breaks.

        The backend compiles nothing, because only the absence of a break is guaranteed. A call
        takes seconds, so this takes only the one with the most arguments.
        """
        if short := self._short(self.small, self.dtype):
            return short
        name, call = list(self.calls().items())[-1]
        outcome = guarantees.fullgraph(self.function, call, "aot_eager")
        holds = outcome == guarantees.NO_BREAK
        return Finding("pass" if holds else "fail", f"{name}: {outcome}")

    def peak(self) -> Finding:
        if short := self._short(self.real, self.dtype):
            return short
        if isinstance(self.device, Cpu):
            if reason := memory.missing():
                return Finding("skip", reason)
            measured = memory.fresh("pre_kernels.check.implementation", *self.argv, "--peak")
            peak = measured["peak_mib"]
            returned = measured["returned_mib"]
        else:
            again = self._step()
            # The first step makes the vendor's libraries allocate their scratch memory.
            again()
            peak, returned = self.device.peak(again)
        designed = formula(self.real, self.dtype, self.impl, self.device.torch_device) / MIB
        ratio = (peak - returned) / designed
        says = (
            f"{ratio:.2f} × the formula: {peak - returned:,.0f} of {designed:,.0f} MiB beside the "
            "gradients"
        )
        values = {
            "peak_mib": peak,
            "returned_mib": returned,
            "formula_mib": designed,
            "ratio": ratio,
        }
        return Finding("pass" if ratio <= 1 else "fail", says, values)

    def time(self) -> Finding:
        if self.failed:
            return Finding("skip", "not timed, because its results are wrong")
        if short := self._short(self.real, self.dtype):
            return short
        call = case(self.real, self.dtype, self.device.torch_device)
        steps = {
            "ours": self._step(),
            "eager": step(reference.pre_loss, call),
            "floor": floor(call),
        }
        sampled = interleaved(self.device, steps, SECONDS[self.device.kind])
        times = {name: spread(samples) for name, samples in sampled.items()}
        ours = times["ours"]["median_ms"]
        over = {name: ours / times[name]["median_ms"] for name in ("floor", "eager")}
        host = self.device.enqueue_us(steps["ours"])
        queued = "" if host is None else f", queued by the host in {host / 1e3:.2f} ms"
        says = (
            f"{over['floor']:.2f} × six bare matmuls, {over['eager']:.2f} × eager: {ours:.2f} "
            f"ms{queued}"
        )
        return Finding("info", says, {**times, "over": over, "enqueue_us": host})

    def resident(self) -> dict[str, float]:
        """Return the values that `memory.fresh` reads, in a process that has done nothing else."""
        rise, returned = memory.second(self._step())
        return {"peak_mib": rise, "returned_mib": sum(x.nbytes for x in returned) / MIB}

    def _step(self) -> Callable[[], tuple[Tensor, ...]]:
        return step(self.function, case(self.real, self.dtype, self.device.torch_device))

    def _short(self, shape: Shape, dtype: torch.dtype) -> Finding | None:
        """Return the finding that a size does not fit into memory, or None. `dtype` is that of the
        arithmetic."""
        want = needed(shape, dtype, workspace(self.impl, self.device.torch_device, dtype))
        free = self.device.free()
        if isinstance(self.device, Cuda):
            want += FLUSH
        if free is None or want <= free:
            return None
        size = f"{shape.selected} rows of width {shape.d} take {want / 2**30:.1f} GiB"
        return Finding(
            "skip",
            f"{size}, of which {free / 2**30:.1f} are free; want a smaller --width, or fewer "
            "--rows",
        )


def _named(name: str, check: Callable[..., Any], *arguments: Any) -> Any:
    """Run the check of one kind of call, and put the call's name before what it raises."""
    try:
        return check(*arguments)
    except Exception as error:
        raise RuntimeError(f"{name}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def report(
    checks: Checks, tell: Callable[[dict[str, Any]], object], wait: Callable[[], object]
) -> None:
    """Run the checks in order and `tell` each finding.

    `wait` returns when the device is free for large or timed checks. It returns something false if
    nobody listens any more.
    """
    small = (checks.small_error, checks.sync, checks.graph, checks.fullgraph)
    large = (checks.real_error, checks.peak, checks.time) if checks.timed else ()
    for number, check in enumerate(small + large):
        if number == len(small):
            tell({"ready": True})
            if not wait():
                return
        tell({"begin": NAMES[number]})
        began = time.monotonic()
        trace: str | None = None
        lost = False
        try:
            finding = check()
        except Exception as error:
            finding = Finding("fail", first_line(error))
            trace = traceback.format_exc()
        try:
            # The error of a kernel may show only here.
            checks.device.synchronize()
        except Exception as error:
            says = f"{first_line(error)}; no more checks on a device in this state"
            finding = Finding("fail", says)
            lost = True
            trace = trace or traceback.format_exc()
        checks.failed |= finding.outcome == "fail" and check in (
            checks.small_error,
            checks.real_error,
        )
        seconds = round(time.monotonic() - began, 3)
        tell({"check": NAMES[number], **finding._asdict(), "traceback": trace, "seconds": seconds})
        if lost:
            break
    if not large:
        says = "not checked, because the kernels are interpreted"
        skipped = Finding("skip", says)._asdict()
        name = "real size, memory, time"
        tell({"check": name, **skipped, "traceback": None, "seconds": 0.0})
    tell({"done": True})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("impl")
    add("width", type=int)
    add("rows", type=int)
    add("dtype", choices=DTYPES)
    add("--peak", action="store_true", help="measure only the peak of resident memory")
    options = parser.parse_args(argv)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    # Libraries print to stderr from here on, so every line on stdout is a record.
    os.dup2(2, 1)

    def tell(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")

    checks = Checks(options.impl, options.width, options.rows, options.dtype)
    if options.peak:
        tell(checks.resident())
    else:
        report(checks, tell, sys.stdin.readline)


if __name__ == "__main__":
    main()
