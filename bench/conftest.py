"""`pytest bench/ --benchmark`: the options, the measurements that the tests of a shape share, and
the tables at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pre_kernels.check.device import current

from . import baselines, cpu_goals, gpu_goals, record, shapes, suite, tables

Group = dict[str, dict[str, Any]]
RECORDS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pre-kernels measurements")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="run the measurements; without it the tests in bench/ are skipped",
    )
    group.addoption(
        "--shape", action="append", default=[], help=f"only this: {', '.join(shapes.BY_NAME)}"
    )
    group.addoption(
        "--dtype",
        action="append",
        choices=list(shapes.DTYPES),
        help="with --shape (default: bf16 and fp32)",
    )
    group.addoption(
        "--rows", action="append", choices=shapes.ROWS, help="with --shape (default: index)"
    )
    group.addoption(
        "--peer", action="append", default=[], choices=list(baselines.BY_NAME), help="only this"
    )
    group.addoption("--seconds", type=float, help="seconds of sampling for each shape")
    group.addoption(
        "--results", help="folder of the result file (default: GPU_OUT, else bench/results)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    wanted = option("--peer")
    plan = shapes.plan(
        current().torch_device,
        option("--shape"),
        option("--dtype") or ("bf16", "fp32"),
        option("--rows") or ("index",),
    )
    cases = [
        pytest.param(shape, dtype, rows, name, id=f"{shape.name}-{dtype}-{rows}-{name}")
        for number, (shape, dtype, rows) in enumerate(plan)
        for name in wanted or baselines.planned(number)
    ]
    metafunc.parametrize(("shape", "dtype", "rows", "peer"), cases)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark"):
        return
    for item in items:
        if item.path.is_relative_to(record.RESULTS.parent):
            item.add_marker(pytest.mark.skip(reason="a measurement: pass --benchmark"))


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[shapes.Shape, str, str], Group]:
    """Return a function from (shape, dtype, rows) to records by baseline. It measures at the first
    call, since baselines take turns, and keeps the records."""
    config = request.config
    device = current()
    kept: dict[tuple[shapes.Shape, str, str], Group] = {}
    path = record.file(record.folder(config.getoption("--results")), device)
    config.stash[RECORDS] = []
    together: dict[tuple[shapes.Shape, str, str], list[str]] = {}
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "peer" in parameters:
            where = (parameters["shape"], parameters["dtype"], parameters["rows"])
            together.setdefault(where, []).append(parameters["peer"])

    def measure(shape: shapes.Shape, dtype: str, rows: str) -> Group:
        where = (shape, dtype, rows)
        if where not in kept:
            seconds = config.getoption("--seconds")
            kept[where] = {}
            for entry in suite.measure(
                shape, dtype, device, together[where], seconds=seconds, rows=rows
            ):
                record.append(path, entry)
                kept[where][entry["peer"]] = entry
            config.stash[RECORDS] += kept[where].values()
        return kept[where]

    return measure


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's tables
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    records = config.stash.get(RECORDS, [])
    if not records:
        return
    terminalreporter.section("loss, forward and backward")
    lines = [
        tables.markdown(tables.loss_table(records)),
        "",
        *tables.refusals(records),
        *tables.provenance(records),
    ]
    goals = cpu_goals if current().kind == "cpu" else gpu_goals
    lines += ["", tables.markdown(goals.table(records, "not measured in this run"))]
    for line in lines:
        terminalreporter.write_line(line)
