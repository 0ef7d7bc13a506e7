"""torchrun restarts a training by transformers.Trainer, whose script resumes from its last
checkpoint, after a node or a process was killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pre_kernels.integrations.launched import Launch
from verify import ROOT

from .support import restarted
from .support.processes import both

LIMIT = 400.0  # seconds for everything that a test waits for


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nodes:
    """The launchers of a training, each the torchrun of one node, all on this machine."""

    def __init__(self, out: Path, count: int, per_node: int, restarts: int, *broken: str) -> None:
        out.mkdir()
        self.out = out
        self.count = count
        self.end = time.monotonic() + LIMIT
        self.launchers: dict[str, subprocess.Popen[bytes]] = {}
        self.command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(count), "--nproc-per-node", str(per_node)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"),
            *("--local-addr", "127.0.0.1", "--max-restarts", str(restarts)),
            *("--monitor-interval", "0.1"),
        ]
        self.script = [
            *("-m", "pre_kernels.integrations.launch", "--layer", "2", "--weight", "0.5", "--"),
            *(restarted.__file__, str(out), *broken),
        ]

    def start(self, name: str) -> None:
        environment = os.environ | {
            "NODE": name,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            # Without it torchrun publishes the address of rank 0 in the first round only, and a
            # launcher that comes later waits for it until it fails (torch 2.9 to 2.13).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        # The rendezvous is on node a, which lives. A node that is gone is noticed after three
        # seconds.
        rendezvous = f"is_host={name == 'a'},keep_alive_interval=1,join_timeout=120"
        command = [*self.command, "--rdzv-conf", rendezvous, *self.script]
        with open(self.out / f"{name}.log", "ab") as log:
            self.launchers[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log
            )

    def wait_until(self, what: Any) -> None:
        while not what():
            for name, launcher in self.launchers.items():
                assert not launcher.poll(), f"{name} ended with {launcher.returncode}"
            assert time.monotonic() < self.end, "it took too long"
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """Kill a node's launcher and its workers."""
        launcher = self.launchers.pop(name)
        launcher.kill()
        launcher.wait()
        for pid in self.workers(name):
            os.kill(pid, signal.SIGKILL)

    def workers(self, name: str) -> list[int]:
        """The workers of a node that are alive."""
        found = [int(p.name) for p in self.out.glob("pids/*") if p.read_text() == name]
        return [pid for pid in found if _alive(pid)]

    def finish(self) -> None:
        """Wait until the training has ended without an error, and leaves no process."""
        self.wait_until(lambda: all(node.poll() == 0 for node in self.launchers.values()))
        assert not any(self.workers(name) for name in self.launchers)

    def close(self) -> None:
        for name in list(self.launchers):
            self.kill(name)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Any]:
    """A function that makes `Nodes`, whose processes end with the test."""
    made = []

    def make(name: str, *args: Any) -> Nodes:
        made.append(Nodes(tmp_path / name, *args))
        return made[-1]

    yield make
    for node in made:
        node.close()


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The model and the head at the end of a training."""
    last = out / restarted.LAST
    return load_file(last / "model.safetensors") | load_file(last / "pre_head.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def said(out: Path, line: str) -> int:
    return sum(log.read_text().count(line) for log in out.glob("*.log"))


@pytest.mark.slow
def test_a_node_that_is_killed_and_comes_back(nodes: Any, tmp_path: Path) -> None:
    """Two nodes, of which one is killed in the fourth step and started again. The training resumes
    from the checkpoint of the second, and ends with the weights of one without an interruption."""
    whole = nodes("whole", 2, 1, 0)
    whole.start("a")
    whole.start("b")
    whole.finish()

    broken = nodes("broken", 2, 1, 3, "b=waits")
    broken.start("a")
    broken.start("b")
    broken.wait_until((broken.out / "broken-down").exists)
    assert sorted(p.name for p in broken.out.glob("checkpoint-*")) == ["checkpoint-2"]
    broken.kill("b")
    broken.start("b")
    broken.finish()

    resumed = f"the model's weights and the head are those of {broken.out}/checkpoint-2"
    assert said(broken.out, resumed) == 1
    assert said(whole.out, "the head are those of") == 0
    assert same(weights(broken.out), weights(whole.out))


@pytest.mark.slow
def test_the_node_with_the_rendezvous_is_killed(nodes: Any, tmp_path: Path) -> None:
    """The launchers of other nodes end with torchrun's error. Given again, the same commands resume
    from the last checkpoint."""
    broken = nodes("broken", 2, 1, 3, "b=waits")
    broken.start("a")
    broken.start("b")
    broken.wait_until((broken.out / "broken-down").exists)
    broken.kill("a")
    assert broken.launchers.pop("b").wait(LIMIT) == 1
    assert "RendezvousConnectionError" in (broken.out / "b.log").read_text()
    assert not broken.workers("b")
    broken.start("a")
    broken.start("b")
    broken.finish()
    _check_resumed(broken.out, tmp_path)


@pytest.mark.slow
def test_a_process_that_is_killed(nodes: Any, tmp_path: Path) -> None:
    """torchrun restarts both processes of a node after one of them was killed."""
    broken = nodes("broken", 1, 2, 1, "a=dies")
    broken.start("a")
    broken.finish()
    _check_resumed(broken.out, tmp_path)


def _check_resumed(out: Path, folder: Path) -> None:
    """The training in `out` resumed once, from its checkpoint of step 2, and its weights at the end
    are those of one without an interruption."""
    assert said(out, f"the model's weights and the head are those of {out}/checkpoint-2") == 1
    both(uninterrupted, str(folder / "whole"))
    assert same(weights(out), weights(folder / "whole"))


def uninterrupted(out: str) -> None:
    """The training of a script under the launcher, which draws the head with the Trainer's seed."""
    with Launch({"layer": 2, "weight": 0.5}):
        restarted.train(out)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
