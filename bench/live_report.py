"""A pytest plugin (`-p bench.live_report`). It writes each test's outcome to the disk at once, so a
run that is killed keeps its results.

After some errors of CUDA, such as an illegal access, a process can do nothing more on the device:
each later test in it would fail for no reason of its own. So a worker of xdist ends once such a
test has been reported, and xdist starts another. Without workers the run stops.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

from pre_kernels.check.device import current

from . import record, where

SUSPECT = re.compile(r"CUDA error|Triton Error \[CUDA\]")  # as torch says it, and as triton does


def works() -> bool:
    """Return whether the device still works. A call that a library refuses does not break it."""
    try:
        return torch.ones(2, device=current().torch_device).sum().item() == 2
    except Exception:
        return False


class LiveReport:
    def __init__(self) -> None:
        device = current()
        self.path = record.file(where.folder(), device)
        self.stamp = record.stamp(device)
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            # A setup or teardown that passed is not recorded.
            return
        if report.nodeid in self.failed:
            # The first failure gives the reason. The end of its worker afterwards is not recorded.
            return
        if report.failed:
            self.failed.add(report.nodeid)
        self._append(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._append(report)

    def _append(
        self, report: pytest.TestReport | pytest.CollectReport, seconds: float = 0.0
    ) -> None:
        line: dict[str, Any] = {"kind": "test", "item": report.nodeid, "outcome": report.outcome}
        line["seconds"] = round(seconds, 3)
        if not report.passed:
            line["message"] = (
                report.longreprtext[-1500:] if report.failed else str(report.longrepr)[-300:]
            )
        record.append(self.path, line | self.stamp)


class LostDevice:
    """Ends the process that runs tests once it has lost the device."""

    def __init__(self, is_worker: bool) -> None:
        self.is_worker = is_worker
        # the test that lost the device, if one has
        self.lost_by = ""

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)  # once xdist has sent the report
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and SUSPECT.search(report.longreprtext) and not works():
            self.lost_by = report.nodeid
        if self.lost_by and report.when == "teardown":
            if self.is_worker:
                os._exit(1)
            self.session.shouldstop = (
                f"{self.lost_by} lost the device to an error of CUDA, so later tests could not pass"
            )


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if not is_worker:  # under xdist the controller alone writes
        config.pluginmanager.register(LiveReport())
    if is_worker or not config.getoption("numprocesses", None):
        config.pluginmanager.register(LostDevice(is_worker))
