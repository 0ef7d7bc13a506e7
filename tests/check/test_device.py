"""The description of a GPU and its times, by stand-ins for torch.cuda."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from pre_kernels.check import device
from pre_kernels.check.device import Cpu, Cuda


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    """Isolate the answers: a test does not find those that another has set."""
    monkeypatch.setenv(device.SILENT, "")
    monkeypatch.delenv(device.SILENT)


@pytest.mark.parametrize(
    "error", [subprocess.TimeoutExpired("nvidia-smi", 20), FileNotFoundError("nvidia-smi")]
)
def test_what_nvidia_smi_does_not_say_is_missing(monkeypatch, error):
    def run(*arguments, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    said = Cuda().describe()
    assert said["device"] == "a card"
    assert said["clocks.sm"] is None
    assert said["driver_version"] is None


def test_why_nvidia_smi_says_nothing_is_no_driver_of_that_name(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho it could not communicate with the driver\nexit 9\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert set(device._card().values()) == {None}


def test_what_hangs_is_waited_for_once(monkeypatch):
    asked = []

    def hangs(command, **options):
        asked.append(command)
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert device._card() == device._card()
    assert len(asked) == 1


def test_a_lost_device_is_described(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "get_device_name", lost)
    monkeypatch.setattr(device, "_card", lambda: {"power.draw": "9 W"})
    assert Cuda().describe() == {"device": "a GPU", "cuda": torch.version.cuda, "power.draw": "9 W"}


def test_what_nvidia_smi_says(monkeypatch):
    out = "550.1, 1980 MHz, 2619 MHz, 1980 MHz, 120.5 W, 41\n1, 2, 3, 4, 5, 6\n"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=out))
    assert device._card() == {
        "driver_version": "550.1",
        "clocks.sm": "1980 MHz",
        "clocks.mem": "2619 MHz",
        "clocks.max.sm": "1980 MHz",
        "power.draw": "120.5 W",
        "temperature.gpu": "41",
    }


def test_the_host_queues_a_step_while_the_gpu_is_busy(monkeypatch):
    """The clock moves only within a step, so the wait for the device before it does not count."""
    order = []
    now = [0.0]
    for name in ("synchronize", "_sleep"):
        monkeypatch.setattr(
            torch.cuda, name, lambda *a, name=name: order.append((name, *a)), raising=False
        )
    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])

    def step():
        order.append(("step",))
        now[0] += 3e-4

    assert Cuda().enqueue_us(step) == pytest.approx(300)
    assert order[:3] == [("synchronize",), ("_sleep", device.HEAD_START), ("step",)]
    assert order[-1] == ("synchronize",)
    assert Cpu().enqueue_us(step) is None


def test_interpreted_kernels_run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert isinstance(device.current(), Cuda)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert isinstance(device.current(), Cpu)


def test_free_memory(monkeypatch):
    monkeypatch.setattr(device, "_read", lambda path: "MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert Cpu().free() == 2 << 20
    monkeypatch.setattr(device, "_read", lambda path: "")
    assert Cpu().free() is None
