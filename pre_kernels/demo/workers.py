"""Run several seeds at once, each in a process of its own. A seed computes in one thread, so
several of them share a machine's cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from pre_kernels.screen import TERMINATED, Terminated

from .stages import Advance, Bar, Stage

# A function of a seed, of further arguments and of a Bar.
Run = Callable[..., Any]
# A process that does not end after so many seconds is killed.
PATIENCE = 10.0
Shown = tuple[AbstractContextManager[Advance], Advance]


class Failed(RuntimeError):
    """The traceback of an error in another process, as text."""


def each_seed(
    run: Run,
    seeds: int | Sequence[int],
    arguments: tuple[Any, ...],
    bar: Bar,
    jobs: int,
    done: Callable[[int, Any], None] = lambda seed, result: None,
) -> list[Any]:
    """Return `[run(seed, *arguments, bar) for seed in seeds]`, computed in `jobs` processes.

    The bars stay in this process, and `done` is called here with each result as soon as it is
    there. If anything fails or stops this process, the others are ended too.

    Args:
        seeds: a number stands for the seeds below it.

    Raises:
        RuntimeError: a process was killed, as by a system that is out of memory.
        Exception: what `run` raised first.
    """
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    results: dict[int, Any] = {}
    if jobs == 1:
        for seed in seeds:
            results[seed] = run(seed, *arguments, bar)
            done(seed, results[seed])
        return [results[seed] for seed in seeds]
    waiting = [*seeds]
    with contextlib.ExitStack() as stack:
        workers = {}
        for _ in range(min(jobs, len(waiting))):
            pipe, process = stack.enter_context(_worker(run, arguments))
            workers[pipe] = process
            _send(pipe, waiting.pop(0))
        shown: dict[int, Shown] = {}
        while len(results) < len(seeds):
            ready: list[Any] = wait([*workers])
            for pipe in ready:
                try:
                    seed, kind, what = pipe.recv()
                except (EOFError, ConnectionError):
                    _lost(workers[pipe])
                if kind == "result":
                    results[seed] = what
                    done(seed, what)
                    if waiting:
                        _send(pipe, waiting.pop(0))
                    else:
                        del workers[pipe]
                elif kind == "error":
                    error, text = what
                    raise error from Failed(text)
                elif kind == "begin":
                    opened = bar(*what)
                    shown[seed] = opened, opened.__enter__()
                elif kind == "step":
                    shown[seed][1](what)
                else:
                    shown.pop(seed)[0].__exit__(None, None, None)
    return [results[seed] for seed in seeds]


@contextmanager
def _worker(run: Run, arguments: tuple[Any, ...]) -> Iterator[tuple[Connection, BaseProcess]]:
    """Start a process that runs the seeds sent to it, and end it on exit."""
    # A forked child would inherit thread pools without their threads.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), daemon=True)
    with _uninterrupted():
        process.start()
    # Without another end in this process, the end of the other process ends the pipe.
    there.close()
    _send(here, (run, arguments))
    try:
        yield here, process
    finally:
        process.terminate()
        process.join(PATIENCE)
        process.kill()
        process.join()
        here.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep ^C from processes that are started here: a terminal sends it to all of them, and only
    this one answers. Here it takes effect at the end."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # It starts with the first process, and would unblock signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(pipe: Connection, what: Any) -> None:
    # Reading from a process that has ended says so.
    with contextlib.suppress(ConnectionError):
        pipe.send(what)


def _lost(process: BaseProcess) -> NoReturn:
    process.join()
    if process.exitcode in (-signal.SIGTERM, TERMINATED):
        # Who ends a group of processes at once means this one too, which may hear of it later.
        raise Terminated
    raise RuntimeError(
        f"worker: got exit status {process.exitcode}, want 0; if the machine is short of memory, "
        "use --jobs 1"
    )


def _work(pipe: Connection) -> None:
    # The parent closes the pipe or dies: then there is nothing left to do.
    with contextlib.suppress(EOFError, ConnectionError):
        # PyTorch and transformers are imported here.
        run, arguments = pipe.recv()
        from .threads import quiet

        quiet()
        # An orderly end also releases semaphores of libraries, which a warning would name else.
        # During the imports SIGTERM ends the process at once: extension modules swallow exceptions.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
        while True:
            seed = pipe.recv()

            @contextmanager
            def bar(stage: Stage, name: str, steps: int, seed: int = seed) -> Iterator[Advance]:
                pipe.send((seed, "begin", (stage, name, steps)))
                yield lambda loss: pipe.send((seed, "step", loss))
                pipe.send((seed, "end", None))

            try:
                answer = (seed, "result", run(seed, *arguments, bar))
            except ConnectionError:
                raise
            except Exception as error:
                answer = (seed, "error", (error, traceback.format_exc()))
            pipe.send(answer)
