"""The pytest plugin that writes each outcome at once, and its behaviour when the device is lost."""

import os
import subprocess

import pytest

from bench import gpu, gpu_stages, live_report, record
from verify import ROOT

LOSES = """
import os
import pytest
from bench import live_report

def say(number):
    with open(os.environ["GPU_OUT"] + "/ran", "a") as out:
        out.write(f"{number} {os.getpid()}\\n")

@pytest.mark.parametrize("number", range(3))
def test_before(number):
    say(number)

def test_is_refused():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")

def test_loses_the_device():
    say("lost")
    live_report.works = lambda: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.parametrize("number", range(3, 9))
def test_after(number):
    say(number)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_device_costs_the_tests_of_its_worker_alone(workers, tmp_path):
    (tmp_path / "test_fake.py").write_text(LOSES)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment |= gpu.environment(tmp_path, dry=True)
    command = [*gpu_stages.pytest(str(tmp_path), "--rootdir", str(tmp_path)), "-n", str(workers)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    lines = record.load([tmp_path / "dry-run.jsonl"])
    ran = dict(line.split() for line in (tmp_path / "ran").read_text().splitlines())
    outcomes = {entry["item"].partition("::")[2]: entry["outcome"] for entry in lines}
    assert outcomes["test_loses_the_device"] == "failed"
    assert (
        "illegal memory access"
        in [entry["message"] for entry in lines if entry["outcome"] == "failed"][-1]
    )
    assert outcomes["test_is_refused"] == "failed"  # and nothing else came of it
    # The end of its worker is not a second failure.
    assert len(lines) == len(outcomes)
    if workers:
        assert {str(number) for number in range(9)} | {"lost"} == set(ran)
        assert list(outcomes.values()).count("passed") == 9
        assert ran["2"] == ran["lost"] != ran["3"]
    else:
        assert "3" not in ran
        assert "lost the device to an error of CUDA" in done.stdout


def test_a_file_that_cannot_be_collected_is_a_failed_test(tmp_path):
    (tmp_path / "test_fake.py").write_text("import nonsense_that_is_nowhere")
    environment = os.environ | gpu.environment(tmp_path, dry=True)
    command = gpu_stages.pytest(str(tmp_path), "--rootdir", str(tmp_path))
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    (line,) = record.load([tmp_path / "dry-run.jsonl"])
    assert (line["kind"], line["outcome"]) == ("test", "failed")
    assert "nonsense_that_is_nowhere" in line["message"]


def test_both_names_of_a_lost_device():
    for text in (
        "RuntimeError: CUDA error: device-side assert",
        "RuntimeError: Triton Error [CUDA]: an illegal",
    ):
        assert live_report.SUSPECT.search(text)
    assert live_report.works()
    assert not live_report.SUSPECT.search("torch.OutOfMemoryError: CUDA out of memory")
