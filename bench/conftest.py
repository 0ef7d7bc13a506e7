"""`pytest bench/ --benchmark`: the options, the measurements that the tests of a shape share, and
the tables at the end.

torch takes seconds to import, so nothing here imports it before pytest has shown that it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pre_kernels import screen

from . import where

if TYPE_CHECKING:
    from .kept import Kept
    from .shapes import Shape

Group = dict[str, dict[str, Any]]
Entry = tuple["Shape", str, str]
KEPT: pytest.StashKey[Kept] = pytest.StashKey()
EARLY: pytest.StashKey[Early] = pytest.StashKey()
HOW = (
    "speed and memory: `pytest bench/ --benchmark` measures them, and "
    "`pytest bench/ --benchmark --shape tiny` takes a minute"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("pre-kernels measurements").addoption
    add(
        "--benchmark",
        action="store_true",
        help="run the measurements; without it the tests in bench/ are skipped",
    )
    lists = {
        "--shape": "only this one, as cpu-16k or tiny; bench/shapes.py lists all",
        "--dtype": "bf16, fp16 or fp32, with --shape (default: bf16 and fp32)",
        "--rows": "index or mask, with --shape (default: index)",
        "--peer": "only this implementation, as ours-torch or eager; docs/benchmarks.md lists all",
    }
    for name, text in lists.items():
        add(name, action="append", default=[], help=text)
    add("--seconds", type=float, help="seconds of sampling for each shape")
    add(
        "--step-limit",
        type=float,
        help="on a CPU, leave out a baseline whose step takes more than this many seconds "
        "(default: 20)",
    )
    where.add_options(add)


class Early:
    """Ends a run at ^C or SIGTERM with what was measured, and with the exit status of a command."""

    def __init__(self) -> None:
        self.status = 0
        self.stoppable = contextlib.ExitStack()
        self.stoppable.enter_context(screen.stoppable())

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # Another subclass is what pytest ends a session with after errors.
        if excinfo.type in (KeyboardInterrupt, screen.Terminated):
            self.status = screen.stopped(excinfo.value)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        run = session.config.stash.get(KEPT, None)
        session.exitstatus = self.status or (run and run.status) or session.exitstatus

    def pytest_unconfigure(self) -> None:
        self.stoppable.close()


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark"):
        # Its table has the same times in 200 columns. --benchmark-verbose brings it back.
        config.option.benchmark_quiet = True
        screen.prepare()
        config.stash[EARLY] = Early()
        config.pluginmanager.register(config.stash[EARLY])


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    config = session.config
    if not config.getoption("--benchmark"):
        return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line("starting: torch takes some seconds to import")
        # The progress of the measurements is shown instead of a letter for each test.
        reporter.showfspath = False

    from . import baselines, shapes

    for option, known in (
        ("--shape", shapes.BY_NAME),
        ("--dtype", shapes.DTYPES),
        ("--rows", shapes.ROWS),
        ("--peer", baselines.BY_NAME),
    ):
        unknown = [value for value in config.getoption(option) if value not in known]
        if unknown:
            raise pytest.UsageError(f"{option}: got {unknown[0]!r}, want one of {', '.join(known)}")


def pytest_report_teststatus(
    report: pytest.TestReport | pytest.CollectReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    measures = config.getoption("--benchmark") and report.nodeid.startswith("bench/")
    if measures and report.outcome != "failed" and config.get_verbosity() <= 0:
        return report.outcome if report.when == "call" else "", "", ""
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" not in metafunc.fixturenames:
        return
    from pre_kernels.check.device import current

    from . import baselines, shapes

    option = metafunc.config.getoption
    plan = shapes.plan(
        current().torch_device,
        option("--shape"),
        option("--dtype") or ("bf16", "fp32"),
        option("--rows") or ("index",),
    )
    cases = [
        pytest.param(shape, dtype, rows, name, id=f"{shape.name}-{dtype}-{rows}-{name}")
        for number, (shape, dtype, rows) in enumerate(plan)
        for name in option("--peer") or baselines.planned(number)
    ]
    metafunc.parametrize(("shape", "dtype", "rows", "peer"), cases)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark"):
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=HOW))


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Shape, str, str], Group]:
    """Return a function from (shape, dtype, rows) to records by baseline. It measures at the first
    call, since baselines take turns, and keeps the records."""
    from pre_kernels.check.device import current

    from . import kept, pace, suite

    config = request.config
    device = current()
    option = config.getoption
    run = config.stash[KEPT] = kept.start(config.option, device, refuse)
    done: dict[Entry, Group] = {}
    plan: dict[Entry, list[str]] = {}
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "peer" in parameters:
            entry = parameters["shape"], parameters["dtype"], parameters["rows"]
            plan.setdefault(entry, []).append(parameters["peer"])
    seconds = option("--seconds")
    limit = option("--step-limit")
    parts = [pace.predicted(names, device, seconds) for names in plan.values()]
    progress = kept.Progress(parts)
    capture = config.pluginmanager.get_plugin("capturemanager")

    def uncaptured() -> contextlib.AbstractContextManager[None]:
        return capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()

    def tell(what: str, seconds: float) -> None:
        with uncaptured():
            progress.tell(what, seconds)

    def measure(shape: Shape, dtype: str, rows: str) -> Group:
        entry = shape, dtype, rows
        if entry not in done:
            done[entry] = {}
            progress.part(list(plan).index(entry))
            try:
                for record in suite.measure(
                    shape,
                    dtype,
                    device,
                    plan[entry],
                    seconds=seconds,
                    rows=rows,
                    step_limit=pace.STEP_LIMIT if limit is None else limit,
                    tell=tell,
                ):
                    with uncaptured():
                        done[entry][record["peer"]] = run.add(record)
            finally:
                with uncaptured():
                    progress.clear()
        return done[entry]

    return measure


def refuse(message: str) -> NoReturn:
    pytest.exit(message, returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's tables
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    run = config.stash.get(KEPT, None)
    if run is None:
        return
    from . import record, shown

    run.stopped = config.stash[EARLY].status
    terminalreporter.section("loss, forward and backward")
    for line in [*shown.loss(record.latest(run.records)), "", *shown.wrapped(run.told())]:
        terminalreporter.write_line(line)
