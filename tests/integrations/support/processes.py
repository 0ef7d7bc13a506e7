"""Several processes for a test: `both(function, *args, **kwargs)` calls it on two ranks at once and
returns both results; `every(count, function, ...)` does so on `count` ranks.

    def gradient_of(seed):
        rank = torch.distributed.get_rank()
        ...
        return tensor

    def test_it():
        zero, one = both(gradient_of, 3)

- The function is one of a module that both ranks can import, a test module or not. It returns what
  pickle can carry; tensors are copied.
- The backend is gloo, in torch.distributed and in accelerate.
- The pair starts with the first call (about 6 s) and serves all later ones of this pytest process;
  each worker of `pytest -n` has a pair of its own. A call costs milliseconds beyond what it does.
  More ranks are kept until a call needs another number of them beside the pair.
- Each call starts alike on all ranks: seed 0, launcher's environment (RANK, WORLD_SIZE, ...), no
  accelerate state; what it changed in `os.environ` is undone. The default gloo group stays unless
  the call destroyed it: then it is made anew. `transformers.Trainer` sees all processes with
  `use_cpu=True` in its arguments.
- An exception on a rank, or `timeout` seconds, is one AssertionError with what every rank last did;
  the processes are ended and the next call starts new ones. Errors that a test expects are caught
  inside the function (`pytest.raises`).
- The processes end with the one that started them, whatever way that one ends.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from signal import SIGABRT
from typing import Any

# How many seconds the other ranks get after an error, and a process to end.
GRACE = 5.0
_worlds: dict[int, World] = {}  # by the number of processes


def both(
    function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any
) -> list[Any]:
    """[result on rank 0, on rank 1] of `function(*args, **kwargs)`, called in two processes; see
    `every`."""
    return every(2, function, *args, timeout=timeout, **kwargs)


def every(
    count: int, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any
) -> list[Any]:
    """The results by rank of `function(*args, **kwargs)`, called in `count` processes.

    Raises:
        AssertionError: with all tracebacks, if a rank raised, died, or took longer than `timeout`
            seconds.
    """
    for other in _worlds.keys() - {2, count}:
        _worlds.pop(other).close()
    if count not in _worlds:
        _worlds[count] = World(count)
    try:
        return _worlds[count].call(function, args, kwargs, timeout)
    except BaseException:
        _worlds.pop(count).close()
        raise


def close() -> None:
    """End all processes. The next call starts others."""
    while _worlds:
        _worlds.popitem()[1].close()


atexit.register(close)


class World:
    """Processes and the pipes to them."""

    def __init__(self, count: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pipes: list[Connection] = []
        for rank in range(count):
            mine, theirs = os.pipe(), os.pipe()
            with open(self.folder / f"{rank}.log", "wb") as log:
                command = [
                    sys.executable,
                    __file__,
                    str(rank),
                    str(count),
                    str(theirs[0]),
                    str(mine[1]),
                    str(self.folder),
                ]
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, pass_fds=(theirs[0], mine[1])
                )
            os.close(theirs[0])
            os.close(mine[1])
            self.processes.append(process)
            self.pipes += [
                Connection(mine[0], writable=False),
                Connection(theirs[1], readable=False),
            ]
        self.answers, self.questions = self.pipes[::2], self.pipes[1::2]

    def call(
        self, function: Callable[..., Any], args: Any, kwargs: Any, timeout: float
    ) -> list[Any]:
        count = len(self.processes)
        question = pickle.dumps((sys.path, timeout, pickle.dumps((function, args, kwargs))))
        results: dict[int, Any] = {}
        failed: dict[int, str] = {}
        for rank, pipe in enumerate(self.questions):
            try:
                pipe.send_bytes(question)
            except OSError:
                failed[rank] = self._end(rank)
        # A worker that takes too long ends itself and reports where it was. This is for one that
        # cannot.
        end = time.monotonic() + timeout + 60
        while len(results) + len(failed) < count:
            left = [
                a
                for rank, a in enumerate(self.answers)
                if rank not in results and rank not in failed
            ]
            ready = wait(left, max(end - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                rank = self.answers.index(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    ok = False
                    value = self._end(rank)
                if ok:
                    results[rank] = value
                else:
                    failed[rank] = value
                    end = min(end, time.monotonic() + GRACE)
        if len(results) == count:
            return [results[rank] for rank in range(count)]
        for rank in set(range(count)) - results.keys() - failed.keys():
            # faulthandler then writes where the process is.
            self.processes[rank].send_signal(SIGABRT)
            failed[rank] = "did not answer\n" + self._end(rank)
        said = [f"--- rank {rank}: {failed.get(rank, 'returned')}" for rank in range(count)]
        name = f"{function.__module__}.{function.__qualname__}"
        raise AssertionError("\n".join([f"{name} in {count} processes", *said]))

    def _end(self, rank: int) -> str:
        """Wait for a process that is ending. Returns how it ended and its last output."""
        process = self.processes[rank]
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log = self.folder / f"{rank}.log"
        written = log.read_text(errors="replace") if log.exists() else ""
        return f"exit code {process.returncode}\n{written[-6000:]}"

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for rank in range(len(self.processes)):
            self._end(rank)
        shutil.rmtree(self.folder, ignore_errors=True)


def join(store: Any, rank: int, count: int = 2, **options: Any) -> None:
    """Make the default group of `count` ranks, and wait until the others have it too.

    gloo lets a rank continue as soon as its own side is connected. If it then ends the group
    immediately, another rank, which is still connecting, fails with "connection closed by peer".
    """
    import torch

    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, **options
    )
    store.set(f"joined-{rank}", "")
    store.wait([f"joined-{other}" for other in range(count)])


def _work(rank: int, count: int, questions: Connection, answers: Connection, folder: str) -> None:
    """A worker: answer questions until there are no more."""
    # Libraries may replace sys.stderr; this descriptor stays the same.
    log = os.fdopen(os.dup(2), "w")
    faulthandler.enable(log)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        # Libraries look at these variables, but nothing connects to them, because the group already
        # exists.
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    number = 0
    while True:
        try:
            path, timeout, content = pickle.loads(questions.recv_bytes())
        except EOFError:
            break
        faulthandler.dump_traceback_later(timeout, exit=True, file=log)
        sys.path[:] = path
        environment = dict(os.environ)
        try:
            if not torch.distributed.is_initialized():
                number += 1
                store = torch.distributed.FileStore(f"{folder}/store-{number}", count)
                join(store, rank, count)
            function, args, kwargs = pickle.loads(content)
            random.seed(0)
            torch.manual_seed(0)
            answer = pickle.dumps((True, function(*args, **kwargs)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
            failed = True
        else:
            failed = False
        if failed and torch.distributed.is_initialized():
            # The other ranks' next collective fails instead of waiting.
            torch.distributed.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
        os.environ.clear()
        os.environ |= environment
        _forget()
        answers.send_bytes(answer)
    if torch.distributed.is_initialized():
        # If this were left to the interpreter's exit, gloo's threads could end while they run,
        # which aborts the process.
        torch.distributed.destroy_process_group()
    gc.unfreeze()
    if rank == 0:
        # pytest-xdist's workers end without running atexit.
        shutil.rmtree(folder, ignore_errors=True)


def _forget() -> None:
    """Forget accelerate's state and DDP's reducers, so that calls do not affect each other."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    gc.collect()
    # What is left are modules. Without them the collections of the next call are quick.
    gc.freeze()


if __name__ == "__main__":
    _rank, _count, _in, _out, _folder = sys.argv[1:]
    _work(
        int(_rank),
        int(_count),
        Connection(int(_in), writable=False),
        Connection(int(_out), readable=False),
        _folder,
    )
