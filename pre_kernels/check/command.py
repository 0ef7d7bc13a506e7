"""`pre-kernels check`: a process for each implementation, a line for each check, all of it in
check.json."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pre_kernels.fused.products import half_precision

from . import implementation
from .cases import DTYPES
from .device import Cpu, Cuda, current

IMPLEMENTATIONS = ("blas", "triton", "fp8", "torch")
# seconds that a check may take
LIMIT = 120.0
# how many characters are kept of what a process that died wrote to stderr
TAIL = 4000
# width, rows and dtype
DEFAULTS = {"cuda": (4096, 9216, "bf16"), "cpu": (512, 1024, "fp32")}
MARKS = {"pass": "PASS", "fail": "FAIL", "skip": "-", "info": ""}
EXAMPLES = """\
examples:
  pre-kernels check                            all that runs here, in under a minute
  pre-kernels check --impl blas --width 3584 --rows 5120
  pre-kernels check --dtype fp16 --out /tmp    check.json goes there; attach it to a bug report
  TRITON_INTERPRET=1 pre-kernels check         without a GPU: the kernels interpreted, in tiny sizes

how to read a line:
  PASS, FAIL, or - for what was left out, with the reason; of a time nothing is guaranteed
  0.85 × the rule       of the error that is allowed, which is a little more than that of eager in
                        the same dtype
  0.50 × the formula    of the memory that the design takes beside the gradients; above 1 is a
                        failure

exit status: 0 all that could be checked passed, 1 something failed or nothing could be checked,
             2 wrong arguments
"""


def add_parser(commands: Any, width: Callable[[str], int]) -> None:
    """Add the command to those of `pre-kernels`."""
    show = commands.add_parser(
        "check",
        help="check and time the loss on this machine",
        description="Check what the library guarantees, for each implementation that can run on "
        "this machine: loss and gradients against float64, no host syncs, CUDA graphs, "
        "torch.compile, peak memory; and time it beside six bare matrix products and eager. A line "
        "for each, the rest in check.json.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument(
        "--impl",
        nargs="+",
        action="extend",
        choices=IMPLEMENTATIONS,
        metavar="IMPL",
        help=f"of {', '.join(IMPLEMENTATIONS)}",
    )
    show.add_argument(
        "--width", type=width, metavar="D", help="of the real size (default: 4096; 512 on a CPU)"
    )
    show.add_argument(
        "--rows", type=rows, metavar="N", help="selected rows (default: 9216; 1024 on a CPU)"
    )
    show.add_argument("--dtype", choices=DTYPES, help="default: bf16; fp32 on a CPU")
    show.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="for check.json (default: this folder)",
    )


def rows(text: str) -> int:
    """A number of rows that is large enough for their mean error to mean something."""
    if not text.isascii() or not text.isdecimal() or int(text) < 64:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number of at least 64")
    return int(text)


class Plan:
    """What is to be checked: the options, with defaults in the place of those left out. `left_out`:
    why each other implementation is not checked."""

    def __init__(self, options: argparse.Namespace, device: Cpu | Cuda) -> None:
        width, rows, dtype = DEFAULTS[device.kind]
        self.width = options.width or width
        self.rows = options.rows or rows
        self.dtype = options.dtype or dtype
        place = device.torch_device
        reasons = {
            name: implementation.unfit(name, place, DTYPES[self.dtype], self.width)
            for name in IMPLEMENTATIONS
        }
        fit = [name for name, reason in reasons.items() if reason is None]
        if options.impl:
            wrong = [
                f"{name}, which cannot run here: {reasons[name]}"
                for name in options.impl
                if reasons[name]
            ]
            if wrong:
                raise ValueError(f"--impl: got {'; '.join(wrong)}; want of {', '.join(fit)}")
            self.impls = list(dict.fromkeys(options.impl))
            self.left_out = {}
        else:
            fast = [name for name in fit if name != "torch"]
            # On a GPU "torch" is only for what the others cannot do.
            self.impls = fast if fast and device.kind == "cuda" else ["torch", *fast]
            self.left_out = {name: reason for name, reason in reasons.items() if reason}


class Child:
    """The process of an implementation. Each line that it tells goes to `heard`, with the child;
    None follows at its end."""

    def __init__(
        self, impl: str, plan: Plan, heard: queue.Queue[tuple[Child, dict[str, Any] | None]]
    ) -> None:
        self.impl = impl
        self.current = "start"
        self.ready = False
        self.finished = False
        self.deadline = time.monotonic() + LIMIT
        self.stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [
            sys.executable,
            "-m",
            "pre_kernels.check.implementation",
            impl,
            str(plan.width),
            str(plan.rows),
            plan.dtype,
        ]
        # Threads that wait for each other by spinning would take the cores from other processes on
        # a busy machine.
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _listen(self, heard: queue.Queue[tuple[Child, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            # The last line may be cut short by the end of the process.
            with contextlib.suppress(json.JSONDecodeError):
                heard.put((self, json.loads(line)))
        heard.put((self, None))

    def go(self) -> None:
        """Let it have the device for itself."""
        assert self.process.stdin is not None
        self.ready = False
        self.deadline = time.monotonic() + LIMIT
        # If it has died meanwhile, the end of its output says so.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def kill(self) -> bool:
        """End it and the processes that it has started; whether it was still there."""
        alive = self.process.poll() is None
        # Also one that has died may have left others behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return alive

    def obituary(self) -> dict[str, Any] | None:
        """The record of a process that did not come to its end, by itself or ended here; None of
        one that did."""
        hung = False
        try:
            status = self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            hung = self.kill()
            status = self.process.wait()
        if self.finished and status == 0:
            return None
        self.stderr.seek(0)
        said = self.stderr.read().strip()[-TAIL:]
        if hung:
            how = f"no answer for {LIMIT:.0f} s, ended"
        else:
            how = (
                f"died of {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            )
        last = (said.splitlines() or ["nothing on stderr"])[-1][:200]
        return {
            "check": self.current,
            "outcome": "fail",
            "says": f"{how}: {last}",
            "traceback": said,
        }

    def late(self) -> bool:
        return not self.ready and time.monotonic() > self.deadline


class Report:
    """The lines on the screen and check.json, which is whole after each of them."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.about = about
        self.results: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        # at once, since this run may end before its first line, and an earlier file would stay
        self.save(finished=False)

    def add(self, impl: str, record: dict[str, Any]) -> None:
        self.results.append({"impl": impl, **record})
        self.counts[record["outcome"]] += 1
        print(
            f"{MARKS[record['outcome']]:<4}  {impl:<6}  {record['check']:<25} {record['says']}",
            flush=True,
        )
        self.save(finished=False)

    def save(self, finished: bool) -> None:
        partial = self.path.with_name(self.path.name + ".part")
        content = strict({**self.about, "finished": finished, "results": self.results})
        partial.write_text(json.dumps(content, indent=1))
        os.replace(partial, self.path)


def strict(value: Any) -> Any:
    """`value` as JSON can say it, which has no nan and no infinity: None and "inf" in their
    places."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def check(options: argparse.Namespace, facts: dict[str, str]) -> int:
    """Run the checks; returns the exit status. `facts`: what a bug report says of the machine.
    Raises ValueError for arguments that cannot be met here."""
    began = time.monotonic()
    device = current()
    plan = Plan(options, device)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    settings = {"impl": plan.impls, "width": plan.width, "rows": plan.rows, "dtype": plan.dtype}
    about = {"date": now, "argv": options.arguments, "settings": settings, "versions": facts}
    heard: queue.Queue[tuple[Child, dict[str, Any] | None]] = queue.Queue()
    children: list[Child] = []
    # SIGTERM becomes KeyboardInterrupt, so that the children are ended too.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for impl in plan.impls:
            children.append(Child(impl, plan, heard))
        report = Report(options.out / "check.json", {**about, "device": device.describe()})
        said = (
            f"; products of {half_precision()}"
            if device.kind == "cpu" and plan.dtype in ("bf16", "fp16")
            else ""
        )
        name = report.about["device"]["device"]
        print(f"{name}: {plan.rows} rows of width {plan.width}, {plan.dtype}{said}", flush=True)
        for impl, reason in plan.left_out.items():
            report.add(impl, {"check": "left out", "outcome": "skip", "says": reason})
        _follow(children, heard, report)
    finally:
        for child in children:
            child.kill()
        signal.signal(signal.SIGTERM, handler)
    report.save(finished=True)
    count = report.counts
    summary = f"{count['pass']} passed, {count['fail']} failed, {count['skip']} left out"
    print(f"{summary} in {time.monotonic() - began:.0f} s; {report.path}", flush=True)
    return 1 if count["fail"] or not count["pass"] else 0


def _follow(
    children: Sequence[Child],
    heard: queue.Queue[tuple[Child, dict[str, Any] | None]],
    report: Report,
) -> None:
    """Take down what the children tell, until all have ended. Small checks run side by side, since
    most of their time is imports and compilation; what is timed runs when all others wait or have
    ended."""
    living = list(children)
    while living:
        if all(child.ready for child in living):
            living[0].go()
        left = min(child.deadline for child in living if not child.ready) - time.monotonic()
        try:
            child, line = heard.get(timeout=max(0.0, left) + 0.01)
        except queue.Empty:
            for child in [child for child in living if child.late()]:
                heard.put((child, None))
            continue
        if child not in living:
            continue  # this is what it told before it was ended
        if line is None:
            living.remove(child)
            if record := child.obituary():
                report.add(child.impl, record)
            continue
        child.deadline = time.monotonic() + LIMIT
        child.ready = "ready" in line
        child.finished = "done" in line
        child.current = line.get("begin", child.current)
        if "check" in line:
            report.add(child.impl, line)
