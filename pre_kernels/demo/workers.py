"""Run one process per seed. A seed computes in one thread, so several of them share a machine's
cores."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import transformers
from threadpoolctl import threadpool_limits

from .model import Advance

# A Bar makes a bar on the screen from a name and a number of steps, and gives the function that
# moves it on.
Bar = Callable[[str, int], AbstractContextManager[Advance]]
# A process reports its bar through this queue. An event is (seed, what): at the start `what` is the
# bar's name and steps, then the loss of each step, and None at the end.
_events: Any = None


def each_seed(
    run: Callable[..., Any], seeds: int, arguments: tuple[Any, ...], bar: Bar, jobs: int
) -> list[Any]:
    """Return `[run(seed, *arguments, bar) for seed in range(seeds)]`, computed in `jobs` processes.
    The bars stay in this process."""
    if jobs == 1:
        return [run(seed, *arguments, bar) for seed in range(seeds)]
    # A forked child would inherit thread pools without their threads.
    context = multiprocessing.get_context("spawn")
    # A SimpleQueue writes at once, so a seed's reports come before its end.
    events = context.SimpleQueue()
    shown: dict[int, tuple[AbstractContextManager[Advance], Advance]] = {}
    with ProcessPoolExecutor(jobs, context, _begin, (events,)) as pool:
        futures = [pool.submit(_run, run, seed, arguments) for seed in range(seeds)]
        for future in futures:
            future.add_done_callback(lambda _: events.put(None))
        running = seeds
        while running:
            event = events.get()
            if event is None:
                running -= 1
                continue
            seed, what = event
            if isinstance(what, tuple):
                opened = bar(*what)
                shown[seed] = opened, opened.__enter__()
            elif what is None:
                shown.pop(seed)[0].__exit__(None, None, None)
            else:
                shown[seed][1](what)
        return [future.result() for future in futures]


def quiet() -> Callable[[], None]:
    """Set one thread and no chatter in this process, and return a function that undoes both."""
    log: Any = transformers.logging
    verbosity = log.get_verbosity()
    threads = torch.get_num_threads()
    log.set_verbosity_error()
    # More threads do not help at this width, and take several times as long on a busy machine.
    torch.set_num_threads(1)
    # The thread pools of numpy and scipy get the same limit.
    limits = threadpool_limits(1)

    def restore() -> None:
        limits.unregister()
        torch.set_num_threads(threads)
        log.set_verbosity(verbosity)

    return restore


def _begin(events: Any) -> None:
    global _events
    _events = events
    quiet()


def _run(run: Callable[..., Any], seed: int, arguments: tuple[Any, ...]) -> Any:
    @contextmanager
    def bar(name: str, steps: int) -> Iterator[Advance]:
        _events.put((seed, (name, steps)))
        yield lambda loss: _events.put((seed, loss))
        _events.put((seed, None))

    return run(seed, *arguments, bar)
