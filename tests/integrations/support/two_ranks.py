"""Two processes for a test: `both(function, *args, **kwargs)` calls it on two ranks at once,
returns both results.

    def gradient_of(seed):
        rank = torch.distributed.get_rank()
        ...
        return tensor

    def test_it():
        zero, one = both(gradient_of, 3)

- The function is one of a module that both ranks can import, a test module or not. It returns what
  pickle can carry; tensors are copied.
- The world size is 2 and the backend gloo, in torch.distributed and in accelerate.
- The pair starts with the first call (about 6 s) and serves all later ones of this pytest process;
  each worker of `pytest -n` has a pair of its own. A call costs milliseconds beyond what it does.
- Each call starts alike on both ranks: seed 0, launcher's environment (RANK, WORLD_SIZE, ...), no
  accelerate state; what it changed in `os.environ` is undone. The default gloo group stays unless
  the call destroyed it: then it is made anew. `transformers.Trainer` sees both processes with
  `use_cpu=True` in its arguments.
- An exception on a rank, or `timeout` seconds, is one AssertionError with what both ranks last did;
  the pair is ended and the next call starts a new one. Errors that a test expects are caught inside
  the function (`pytest.raises`).
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

# How many seconds the other rank gets after an error, and a process to end.
GRACE = 5.0
_pair: Pair | None = None


def both(
    function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any
) -> list[Any]:
    """[result on rank 0, on rank 1] of `function(*args, **kwargs)`, called in two processes.

    Raises:
        AssertionError: with both tracebacks, if a rank raised, died, or took longer than `timeout`
            seconds.
    """
    global _pair
    if _pair is None:
        _pair = Pair()
    try:
        return _pair.call(function, args, kwargs, timeout)
    except BaseException:
        close()
        raise


def close() -> None:
    """End the pair if there is one. The next call starts another."""
    global _pair
    if _pair is not None:
        _pair.close()
        _pair = None


atexit.register(close)


class Pair:
    """Two processes and the pipes to them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="two-"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pipes: list[Connection] = []
        self.ready = [False, False]
        for rank in range(2):
            mine, theirs = os.pipe(), os.pipe()
            with open(self.folder / f"{rank}.log", "wb") as log:
                command = [
                    sys.executable,
                    __file__,
                    str(rank),
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
        while len(results) + len(failed) < 2:
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
        if len(results) == 2:
            return [results[0], results[1]]
        for rank in {0, 1} - results.keys() - failed.keys():
            # faulthandler then writes where the process is.
            self.processes[rank].send_signal(SIGABRT)
            failed[rank] = "did not answer\n" + self._end(rank)
        said = [f"--- rank {rank}: {failed.get(rank, 'returned')}" for rank in range(2)]
        raise AssertionError(
            "\n".join([f"{function.__module__}.{function.__qualname__} in two processes", *said])
        )

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
        for rank in range(2):
            self._end(rank)
        shutil.rmtree(self.folder, ignore_errors=True)


def join(store: Any, rank: int, **options: Any) -> None:
    """Make the default group of the two, and wait until the other has it too.

    gloo lets a rank continue as soon as its own side is connected. If it then ends the group
    immediately, the other rank, which is still connecting, fails with "connection closed by peer".
    """
    import torch

    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, **options)
    store.set(f"joined-{rank}", "")
    store.wait(["joined-0", "joined-1"])


def _work(rank: int, questions: Connection, answers: Connection, folder: str) -> None:
    """A worker: answer questions until there are no more."""
    # Libraries may replace sys.stderr; this descriptor stays the same.
    log = os.fdopen(os.dup(2), "w")
    faulthandler.enable(log)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
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
                store = torch.distributed.FileStore(f"{folder}/store-{number}", 2)
                join(store, rank)
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
            # The other rank's next collective fails instead of waiting.
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
    _rank, _in, _out, _folder = sys.argv[1:]
    _work(
        int(_rank),
        Connection(int(_in), writable=False),
        Connection(int(_out), readable=False),
        _folder,
    )
