"""The demo as a whole: what it writes, what it keeps when it is stopped, and that a disk that is
full loses nothing that was measured."""

import errno
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait

import pytest
import torch
from safetensors import SafetensorError

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from pre_kernels import cli, sources
from pre_kernels.demo import Unsaved, export, parts, results, workers
from pre_kernels.demo.run import run
from pre_kernels.demo.settings import Settings
from pre_kernels.screen import Terminated
from verify import ROOT

from .support import TINY, committed, no_bar, screen

FULL = "No space left on device; free space there, or choose another folder"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the folder, the measurements and the screen of a demo with a process per seed."""
    out = tmp_path_factory.mktemp("demo") / "mit Leerzeichen, ü 目录"
    console = screen()
    threads = torch.get_num_threads()
    measurements = run(TINY, "cpu", out, console, jobs=2)
    assert torch.get_num_threads() == threads
    return out, measurements, console.file.getvalue()


def test_the_screen_and_the_next_command(tiny):
    out, _, printed = tiny
    lines = printed.splitlines()
    (command,) = [line for line in lines if " diagnose " in line]
    arguments = cli.parser().parse_args(shlex.split(command)[1:])
    assert arguments.images == out / "scenes" / "images"
    assert arguments.images.is_dir()
    assert max(len(line) for line in lines if str(out) not in line and "seed" not in line) <= 80
    for seed in (0, 1):
        for stage in ("instruction tuning with PRe", "measuring with PRe"):
            assert f"seed {seed}: {stage}: 3 steps" in printed
    assert "left)" in printed


def test_the_files(tiny):
    out, measurements, _ = tiny
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "demo.html").read_text().startswith("<!DOCTYPE html>")
    table = results.markdown(measurements)
    assert table in (out / "demo.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert sum("contrast ratio, layer" in line for line in rows) == TINY.layers + 1
    assert not (out / "parts").exists()

    saved = json.loads((out / "demo.json").read_text())
    assert saved == json.loads(json.dumps(measurements))
    assert saved["settings"]["tune_steps"] == 3
    assert saved["settings"]["layer"] == 1
    assert saved["device"].endswith("2 processes")
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["measured"] == sources.digest("demo")
    assert [seed["seed"] for seed in saved["seeds"]] == [0, 1]
    for metrics in (seed[arm] for seed in saved["seeds"] for arm in ("before", "without", "with")):
        assert len(metrics["probe"]) == len(metrics["contrast"]) == TINY.layers + 1
        assert all(0 <= value <= 1 for value in [*metrics["probe"], metrics["accuracy"]])
        assert -1 <= metrics["pre_loss"] <= 1
        assert all(math.isfinite(value) for value in metrics["cohesion"] + metrics["coupling"])
    assert len(saved["seeds"][0]["with"]["train_pre_loss"]) == TINY.align_steps + TINY.tune_steps
    assert "train_pre_loss" not in saved["seeds"][0]["without"]


def test_a_resumed_run_has_the_numbers_of_one_in_one_go(tiny, tmp_path):
    _, measurements, _ = tiny
    before = parts.Parts(TINY, "cpu", tmp_path)
    before.before = 100.0
    before.add(0, (measurements["seeds"][0], []))
    (tmp_path / "models" / "with").mkdir(parents=True)
    (tmp_path / "models" / "with" / "config.json").touch()
    console = screen()
    resumed = run(TINY, "cpu", tmp_path, console, jobs=1)
    printed = console.file.getvalue()
    assert "Resuming: seed 0 is finished" in printed
    assert "seed 1: measuring" in printed
    assert "seed 0: measuring" not in printed
    assert resumed["seeds"] == measurements["seeds"]
    assert resumed["seconds"] > 100


@pytest.fixture
def measured(monkeypatch):
    """Let seeds have the committed numbers, without any training."""
    found = committed()
    monkeypatch.setattr(parts, "run_seed", lambda seed, *arguments: found["seeds"][seed])
    return found


def broken_disk(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_parts_of_another_experiment_are_not_read(measured, tmp_path):
    first = parts.Parts(Settings(), "cpu", tmp_path)
    first.add(1, (measured["seeds"][1], []))
    first.add(0, (measured["seeds"][0], []))
    assert first.kept() == [0, 1]
    # Seed 0's models are not there.
    assert [*parts.Parts(Settings(seeds=5), "cpu", tmp_path).done] == [1]
    assert not parts.Parts(Settings(weight=1.0), "cpu", tmp_path).done
    assert not parts.Parts(Settings(), "cuda", tmp_path).done
    path = tmp_path / "parts" / "seed-1.json"
    path.write_text(path.read_text()[:100])
    assert not parts.Parts(Settings(), "cpu", tmp_path).done


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
def test_a_stopped_run_keeps_the_finished_seeds(stop, measured, monkeypatch, tmp_path):
    def second_is_stopped(seed, *arguments):
        if seed:
            raise stop
        return measured["seeds"][0]

    monkeypatch.setattr(parts, "run_seed", second_is_stopped)
    with pytest.raises(stop) as stopped:
        run(Settings(), "cpu", tmp_path, screen())
    folder = tmp_path / "parts"
    assert str(stopped.value) == f"seed 0 kept in {folder}; the same command resumes from there"
    assert [path.name for path in folder.iterdir()] == ["seed-0.json"]


def test_a_run_that_is_stopped_while_it_draws_keeps_all_seeds(measured, monkeypatch, tmp_path):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.page, "html", stop)
    with pytest.raises(KeyboardInterrupt, match="seeds 0, 1 kept in"):
        run(Settings(), "cpu", tmp_path, screen())


def test_a_full_disk_loses_no_measurement(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(results.page, "html", broken_disk)
    console = screen()
    with pytest.raises(Unsaved) as error:
        run(Settings(), "cpu", tmp_path, console)
    assert str(error.value) == f"cannot write {tmp_path / 'demo.html'}: {FULL}"
    assert "linear probe, last layer" in console.file.getvalue()
    assert "demo.png, .md, .json" in console.file.getvalue()
    assert (tmp_path / "parts" / "seed-1.json").exists()


def test_a_disk_that_takes_no_part_or_model(measured, monkeypatch, tmp_path):
    (tmp_path / "parts").touch()
    done = parts.Parts(Settings(), "cpu", tmp_path)
    done.add(0, (measured["seeds"][0], []))
    (problem,) = done.problems
    assert problem.startswith(f"{tmp_path / 'parts'}: File exists")
    assert done.done[0]["metrics"] == measured["seeds"][0]

    def of_safetensors(*_):
        raise SafetensorError("Error: I/O error: No space left on device (os error 28)")

    for broken in (broken_disk, of_safetensors):
        monkeypatch.setattr(export, "save_model", broken)
        kept = export.Kept(tmp_path)
        kept.model(None, "with")
        assert kept.problems == [f"cannot write {tmp_path / 'models/with'}: {FULL}"]


def broken(seed, bar):
    with bar(None, f"seed {seed}", 2) as advance:
        advance(1.0)
        if seed:
            raise ValueError(f"seed {seed} is broken")
        advance(1.0)
    return seed


def test_a_failed_seed_raises_what_it_raised():
    with pytest.raises(ValueError, match="seed 1 is broken") as error:
        workers.each_seed(broken, 2, (), no_bar, 2)
    assert "line" in str(error.value.__cause__)


def endless(seed, bar):
    with bar(None, str(os.getpid()), 1):
        signal.pause()


def killed(seed, bar):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_workers_end_with_the_run(capfd):
    begun = []

    @contextmanager
    def bar(stage, name, steps):
        begun.append(int(name))
        if len(begun) == 2:
            raise KeyboardInterrupt
        yield None

    with pytest.raises(KeyboardInterrupt):
        workers.each_seed(endless, 2, (), bar, 2)
    for process in begun:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    with pytest.raises(RuntimeError, match="worker: got exit status -9, want 0"):
        workers.each_seed(killed, 2, (), no_bar, 2)
    assert capfd.readouterr().err == ""


def swallow():
    """What an extension module may do with an exception while it is imported."""
    end = time.monotonic() + PATIENT
    while time.monotonic() < end:
        with suppress(BaseException):
            time.sleep(1)


class Imported:
    """Its import takes `PATIENT` seconds."""

    def __reduce__(self):
        return swallow, ()


PATIENT = 100.0


def test_workers_that_still_import_end_at_once(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", PATIENT)
    monkeypatch.setattr(workers, "wait", lambda pipes: wait(pipes, 5.0) or stop())

    def stop():
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        workers.each_seed(broken, 2, (Imported(),), no_bar, 2)
    assert time.monotonic() - start < PATIENT / 2


STARTED = """
import sys
from pathlib import Path
from pre_kernels import screen
from pre_kernels.demo.run import run
from tests.demo.support import TINY
sys.exit(screen.run(lambda: run(TINY, "cpu", Path(sys.argv[1]), jobs=2) and 0))
"""


def test_ctrl_c_while_workers_start_leaves_one_line(tmp_path):
    """A terminal sends ^C to all processes of the command."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("2 seeds, 2 at a time"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    want = "pre-kernels: interrupted: no seed was finished; the same command starts again"
    assert (process.returncode, said.splitlines()[-1:]) == (130, [want])
    assert "Traceback" not in said
