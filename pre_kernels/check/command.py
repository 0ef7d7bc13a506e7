"""`pre-kernels check`: one process for each implementation, one line for each check, all results in
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pre_kernels import screen
from pre_kernels.fused.products import half_precision

from . import IMPLEMENTATIONS, implementation
from .cases import DTYPES
from .device import Cpu, Cuda, current

# A check may take this many seconds.
LIMIT = 120.0
# This many characters are kept of the stderr of a process that died.
TAIL = 4000
# The defaults are width, rows and dtype.
DEFAULTS = {"cuda": (4096, 9216, "bf16"), "cpu": (512, 1024, "fp32")}
MARKS = {"pass": "PASS", "fail": "FAIL", "skip": "-", "info": ""}


class Plan:
    """The checks to run: the options, with defaults for those left out. `left_out` has the reason
    for each implementation that is not checked."""

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
                raise ValueError(f"--impl: got {'; '.join(wrong)}; want one of {', '.join(fit)}")
            self.impls = list(dict.fromkeys(options.impl))
            self.left_out = {}
        else:
            fast = [name for name in fit if name != "torch"]
            # On a GPU "torch" is only for what the other implementations cannot do.
            self.impls = fast if fast and device.kind == "cuda" else ["torch", *fast]
            self.left_out = {name: reason for name, reason in reasons.items() if reason}


class Child:
    """The process of one implementation. It puts each line that the process prints into `heard`,
    with itself, and None at the end."""

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
        # Threads that spin while they wait would take the cores from other processes on a busy
        # machine.
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
        """Give the process the device for itself."""
        assert self.process.stdin is not None
        self.ready = False
        self.deadline = time.monotonic() + LIMIT
        # If the process has died meanwhile, the end of its output says so.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def kill(self) -> bool:
        """End the process and those that it has started; return whether it was still alive."""
        alive = self.process.poll() is None
        # A dead process may have left others behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return alive

    def obituary(self) -> dict[str, Any] | None:
        """Return the record of a process that died or was ended here, or None if it finished."""
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
    """The lines on the screen, and check.json, which is complete after each of them."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.about = about
        self.results: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.lost = False
        # This saves at once, because the run may end before its first line, and an earlier file
        # would stay.
        self.save(finished=False)

    def add(self, impl: str, record: dict[str, Any]) -> None:
        self.results.append({"impl": impl, **record})
        self.counts[record["outcome"]] += 1
        begin = f"{MARKS[record['outcome']]:<4}  {impl:<6}  {record['check']:<25} "
        print(screen.hanging(begin, record["says"]), flush=True)
        self.save(finished=False)

    def save(self, finished: bool) -> None:
        """Write the file. If the disk does not take it, say so once: the lines are what remains."""
        content = strict({**self.about, "finished": finished, "results": self.results})
        try:
            screen.write(self.path, json.dumps(content, indent=1))
        except OSError as error:
            if not self.lost:
                screen.say(f"error: {screen.why(error)}; the checks continue")
            self.lost = True


def strict(value: Any) -> Any:
    """Return `value` without the numbers that JSON does not have: nan becomes None, infinity
    "inf"."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def check(options: argparse.Namespace, facts: dict[str, str]) -> int:
    """Run the checks and return the exit status. `facts` describes the machine for a bug report.
    Raises ValueError for arguments that this machine cannot meet."""
    began = time.monotonic()
    device = current()
    plan = Plan(options, device)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    settings = {"impl": plan.impls, "width": plan.width, "rows": plan.rows, "dtype": plan.dtype}
    about = {"date": now, "argv": options.arguments, "settings": settings, "versions": facts}
    heard: queue.Queue[tuple[Child, dict[str, Any] | None]] = queue.Queue()
    children: list[Child] = []
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
    report.save(finished=True)
    count = report.counts
    summary = f"{count['pass']} passed, {count['fail']} failed, {count['skip']} left out"
    file = f"{report.path} is not complete" if report.lost else report.path
    print(f"{summary} in {time.monotonic() - began:.0f} s; {file}", flush=True)
    return 1 if count["fail"] or not count["pass"] or report.lost else 0


def _follow(
    children: Sequence[Child],
    heard: queue.Queue[tuple[Child, dict[str, Any] | None]],
    report: Report,
) -> None:
    """Record what the children report, until all have ended.

    Small checks run side by side, because they spend most of their time on imports and compilation.
    Timed checks run when all others wait or have ended.
    """
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
            continue  # The child wrote this before it was ended.
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
