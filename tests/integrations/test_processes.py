"""The helper for several processes: results by rank, both tracebacks, a time limit, nothing left
behind."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from .support import processes
from .support.processes import both, every, join


def ranks(word: str) -> Any:
    total = torch.tensor([1.0 + torch.distributed.get_rank()])
    torch.distributed.all_reduce(total)
    return word, torch.distributed.get_rank(), total, os.getpid()


def one_raises() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("only here")
    torch.distributed.barrier()


def one_waits() -> None:
    if torch.distributed.get_rank() == 0:
        time.sleep(60)


def one_dies() -> None:
    if torch.distributed.get_rank() == 0:
        os._exit(3)


def leaves_things() -> None:
    os.environ["LEFT"] = "1"
    torch.distributed.destroy_process_group()


def joins_and_leaves(folder: str) -> None:
    rank = torch.distributed.get_rank()
    for number in range(100):
        torch.distributed.destroy_process_group()
        join(torch.distributed.FileStore(f"{folder}/{number}", 2), rank)


def sees_accelerate() -> tuple[int, bool]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    total = accelerator.reduce(torch.ones(()))
    assert total == 2
    return accelerator.num_processes, "LEFT" in os.environ


def test_results_by_rank() -> None:
    zero, one = both(ranks, "x")
    assert (zero[:3], one[:3]) == (("x", 0, torch.tensor([3.0])), ("x", 1, torch.tensor([3.0])))
    again = both(ranks, word="y")
    assert [r[3] for r in again] == [zero[3], one[3]]  # the same processes


def test_more_than_two() -> None:
    found = every(3, ranks, "x")
    assert [r[:3] for r in found] == [("x", rank, torch.tensor([6.0])) for rank in range(3)]
    assert [r[3] for r in every(3, ranks, "y")] == [r[3] for r in found]
    pair = both(ranks, "x")
    every(1, ranks, "x")
    with pytest.raises(ProcessLookupError):
        os.kill(found[2][3], 0)
    assert [r[3] for r in both(ranks, "x")] == [r[3] for r in pair]
    processes.close()


def test_calls_start_alike() -> None:
    both(leaves_things)
    for _ in range(2):
        assert both(sees_accelerate) == [(2, False)] * 2


def test_a_group_is_joined_by_both(tmp_path: Path) -> None:
    """A rank may leave the group at once, because the other is in it already."""
    both(joins_and_leaves, str(tmp_path))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            one_raises,
            r"(?s)test_processes.one_raises.*rank 0: .*rank 1: Traceback.*one_raises.*"
            r"KeyError: 'only here'",
        ),
        (one_waits, r"(?s)rank 0: exit code 1\n.*Timeout.*in one_waits.*rank 1: returned"),
        (one_dies, r"(?s)rank 0: exit code 3\n.*rank 1: returned"),
    ],
)
def test_failures(function: Any, message: str) -> None:
    before = [r[3] for r in both(ranks, "")]
    start = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        both(function, timeout=1)
    assert time.monotonic() - start < 2 * processes.GRACE
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
