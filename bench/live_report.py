"""A pytest plugin (`-p bench.live_report`): each test's outcome is a line on the disk at once, so a run that is killed
keeps what it found."""

from __future__ import annotations

from typing import Any

import pytest

from pre_kernels.check.device import current

from . import record


class LiveReport:
    def __init__(self) -> None:
        device = current()
        self.path, self.stamp = record.file(record.folder(), device), record.stamp(device)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return  # a setup or teardown without news
        line: dict[str, Any] = {"kind": "test", "item": report.nodeid, "outcome": report.outcome}
        line["seconds"] = round(report.duration, 3)
        if not report.passed:
            line["message"] = report.longreprtext[-1500:] if report.failed else str(report.longrepr)[-300:]
        record.append(self.path, line | self.stamp)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # under xdist the controller alone writes
        config.pluginmanager.register(LiveReport())
