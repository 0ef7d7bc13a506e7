"""Runs the tests on a mutant: in a copy of the sources, and in a fork of a process that has
imported everything except the package."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

from .. import ROOT
from .mutants import PACKAGE, Mutant

GENERAL = (
    *("row_kernels", "rounding", "kernels", "products", "loss"),
    *("memory_safety", "long_offsets", "ops"),
)
TESTS = (
    *GENERAL,
    *("autograd", "torch_func", "copies", "repeats"),
    *("checks", "fp8", "fuzz_regressions", "head", "cost", "tune"),
)
# These tests run in a separate process, test other things than the kernels, or take long and see
# nothing that others miss.
PASSED_OVER = (
    "importing_the_package",
    "training_ends_where",
    "inductor_takes_other",
    "distributed_tensors",
    "two_models_in_two_threads",
)
# A test that takes this many seconds plus ten times its usual time is in an endless loop.
PER_TEST = 20


class Tests:
    """A pytest plugin that runs only the given tests, in their order, each under an alarm, and
    keeps the first failure."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = seconds
        self.failed = None
        self.ran = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = {
            item.nodeid: item
            for item in items
            if not any(name in item.nodeid for name in PASSED_OVER)
        }
        # A test may have gained parameters since it was recorded: then all its cases run.
        meant = [
            name
            for wanted in self.seconds or ()
            for name in known
            if wanted in (name, name.partition("[")[0])
        ]
        items[:] = [known[name] for name in (known if self.seconds is None else meant)]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        import torch

        torch.manual_seed(0)
        usual = (self.seconds or {}).get(item.nodeid, 10)
        # The limit is one of processor time, since other processes may use the machine. The signal
        # ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, PER_TEST + 10 * usual)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_sessionfinish(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


class Reach(Tests):
    """Runs all tests, and notes the seconds of each and the lines of the package that it
    reaches."""

    def __init__(self, package: Path) -> None:
        super().__init__()
        self.package = package
        self.took = dict[str, float]()
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[f"{package}/*"]
        )

    def pytest_collection_finish(self) -> None:
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            self.took[item.nodeid] = round(time.perf_counter() - start, 4)
            self.coverage.switch_context("")

    def lines(self) -> dict[str, dict[int, list[str]]]:
        """The tests that reach each line of each file of the package."""
        self.coverage.stop()
        data = self.coverage.get_data()
        files = [Path(name) for name in data.measured_files()]
        return {
            str(file.relative_to(self.package)): {
                line: sorted(filter(None, tests))
                for line, tests in data.contexts_by_lineno(str(file)).items()
            }
            for file in files
        }


def prepare() -> None:
    """Import the modules that take time to import, but nothing of the package."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        TRITON_INTERPRET="1",
        PYTHONDONTWRITEBYTECODE="1",
    )
    import hypothesis  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch._dynamo
    import torch._functorch.aot_autograd
    import torch.testing
    import triton.language
    import triton.runtime.interpreter
    import triton.tools.tensor_descriptor  # noqa: F401

    torch.set_num_threads(1)


def copy(folder: Path) -> Path:
    """Copy the files that the tests need to `folder`; returns the package to mutate there."""
    for name in ("pre_kernels", "integrations", "verify", "tests", "bench"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "results"),
        )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "pre_kernels" / "fused"


def forked(job: Callable[[], Any], limit: float) -> tuple[Any, int]:
    """Run `job` in a fork. Returns its result, through JSON, and its exit status, or minus the
    signal that ended it."""
    with tempfile.TemporaryFile("w+") as answer:
        if (pid := os.fork()) == 0:
            try:
                os.setpgid(0, 0)
                # Tests expect the handler that a process starts with.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                null = os.open(os.environ.get("MUTATE_LOG", os.devnull), os.O_RDWR | os.O_CREAT)
                os.dup2(null, 1)
                os.dup2(null, 2)
                answer.write(json.dumps(job()))
                answer.flush()
                os._exit(0)
            except BaseException:
                os._exit(3)
        # Both set the group, since either may come first.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        end = time.monotonic() + limit
        try:
            while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
                if time.monotonic() > end:
                    os.killpg(pid, signal.SIGALRM)
                    end = float("inf")
                time.sleep(0.01)
        finally:
            # This ends the processes that it started, and after ^C the fork itself.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(done[1])
        answer.seek(0)
        return (json.load(answer) if status == 0 else None), status


def pytest_in(folder: Path, plugin: Tests, files: Iterable[str]) -> int:
    """Run pytest in the child, where nothing of the package is imported yet."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    options = [
        "-x",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:benchmark",
    ]
    status = pytest.main([*options, *files], plugins=[plugin])
    package = sys.modules.get("pre_kernels")
    if package is not None and package.__file__ != str(folder / "pre_kernels" / "__init__.py"):
        raise RuntimeError(f"tested {package.__file__} instead of the mutant")
    return int(status)


def run(mutant: Mutant, folder: Path, seconds: dict[str, float] | None) -> tuple[str, str | None]:
    """The outcome, and the test that failed. `seconds`: the tests to run; None: those of
    `GENERAL`."""
    path = folder / PACKAGE.relative_to(ROOT) / mutant.file
    original = path.read_text()
    stat = path.stat()
    path.write_text(mutant.apply(original))
    plugin = Tests(seconds)

    files = {f"tests/core/test_{name}.py": 0 for name in GENERAL} if seconds is None else seconds

    def job() -> Any:
        status = pytest_in(folder, plugin, dict.fromkeys(name.partition("::")[0] for name in files))
        return status, plugin.failed, plugin.ran

    try:
        outcome, status = forked(job, 120 + (10 * sum(seconds.values()) if seconds else 900))
    finally:
        path.write_text(original)
        # The compiled file next to it belongs to this text.
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if outcome is None:
        return ("timeout" if status in (-signal.SIGPROF, -signal.SIGALRM) else "crash"), None
    status, failed, ran = outcome
    if status in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise LookupError(f"no such tests: {', '.join(files)}")
    if failed:
        return "killed", failed
    return ("survived" if status == 0 and ran else "invalid"), None
