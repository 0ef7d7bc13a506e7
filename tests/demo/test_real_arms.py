"""The trainings of the real demo, with stand-ins for its parts."""

import dataclasses
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("efficientnet_lite_pytorch")

from safetensors import SafetensorError

from pre_kernels.demo import words as texts
from pre_kernels.demo.real import arm, results, run, train, work
from pre_kernels.demo.real.arm import Arm, Seed
from pre_kernels.demo.real.pieces import Pieces, Unavailable
from pre_kernels.diagnostics.run import trace

from .stand_ins import TINY
from .support import no_bar, screen


def test_arms_start_alike_and_resume(tiny, tmp_path, monkeypatch):
    seed = Seed(0, TINY, tiny, "cpu", tmp_path, no_bar)
    before, (aligned, metrics) = seed.before(), seed.aligned()
    assert metrics["layers"] == [0, 1, 2, 3, 4]
    assert before["probe"] != metrics["probe"]
    changed = [
        name
        for (name, new), old in zip(
            aligned.named_parameters(), seed.model.parameters(), strict=True
        )
        if not torch.equal(new, old)
    ]
    assert changed
    assert all(arm.PROJECTOR in name for name in changed)
    without = seed.run("without", Arm(None))
    with_ = seed.run("with", Arm({"anchor_norm": "center"}))
    # The first step's loss is that of the same model on the same batch.
    assert without["task_loss"][0] == with_["task_loss"][0] != without["task_loss"][1]
    assert len(with_["pre_loss"]) == TINY.tune_steps
    assert "pre_loss" not in without
    for name, own in (("lora", Arm(None, trained="lora")), ("both", Arm(both=True))):
        assert len(seed.run(name, own)["task_loss"]) == TINY.tune_steps
    frozen = seed.run("frozen", Arm(trained="frozen", longer=2))
    assert len(frozen["task_loss"]) == 2 * TINY.tune_steps
    assert not [path for path in seed.folder.iterdir() if path.is_dir()]

    def fail(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(arm, "train_stage", fail)
    again = Seed(0, TINY, tiny, "cpu", tmp_path, no_bar)
    assert again.run("with", Arm({"anchor_norm": "center"})) == with_
    assert again.aligned()[1] == metrics


def test_all_models_are_measured_as_training_computes(tiny, tmp_path):
    bf16 = dataclasses.replace(TINY, bf16=True)
    seed = Seed(0, bf16, tiny, "cpu", tmp_path, no_bar)
    before = seed.before()
    # The Trainer leaves its autocast around the model.
    autocast = torch.autocast("cpu", torch.bfloat16)
    seed.model.forward = autocast(seed.model.forward)
    assert seed._measure(seed.model, "again") == before
    seed.settings = TINY
    del seed.model.forward
    assert seed._measure(seed.model, "in float32")["cosine"] != before["cosine"]


@pytest.mark.parametrize("own", [Arm(None), Arm()], ids=["without PRe", "with PRe"])
def test_an_arm_that_was_stopped_resumes_at_its_checkpoint(own, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVED_EVERY", 2)
    seed = Seed(0, TINY, tiny, "cpu", tmp_path / "whole", no_bar)
    whole = seed.run("arm", own)

    class Stopped(Exception):
        pass

    steps = []

    def advance(loss):
        steps.append(loss)
        if len(steps) == 3:
            raise Stopped

    @contextmanager
    def stop(stage, name, count):
        yield advance if stage is arm.TUNE else lambda loss: None

    seed = Seed(0, TINY, tiny, "cpu", tmp_path / "stopped", stop)
    with pytest.raises(Stopped):
        seed.run("arm", own)
    seed.bar = no_bar
    again = seed.run("arm", own)
    assert again["task_loss"] == whole["task_loss"]
    assert again["probe"] == whole["probe"]


def test_a_checkpoint_that_is_not_whole_loses_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVED_EVERY", 1)
    steps = []

    @contextmanager
    def count(stage, name, number):
        yield lambda loss: steps.append(stage)

    whole = Seed(0, TINY, tiny, "cpu", tmp_path / "whole", no_bar).run("arm", Arm())
    seed = Seed(0, TINY, tiny, "cpu", tmp_path, no_bar)
    seed.aligned()
    save_file = work.save_file

    def stopped(weights, path):
        save_file(weights, path)
        if path.parent.name == "checkpoint-3":
            raise KeyboardInterrupt

    monkeypatch.setattr(work, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        seed.run("arm", Arm())
    (folder,) = seed.folder.glob("arm */stage-2")
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert work.last_checkpoint(folder) == folder / "checkpoint-2"
    monkeypatch.setattr(work, "save_file", save_file)
    seed.bar = count
    assert seed.run("arm", Arm()) == whole
    assert steps.count(arm.TUNE) == 1


def test_an_arm_with_other_options_is_not_that_of_the_same_name(tiny, tmp_path):
    seed = Seed(0, TINY, tiny, "cpu", tmp_path, no_bar)
    first = seed.run("arm", Arm())
    assert seed.run("arm", Arm({"weight": 8.0})) != first
    assert seed.run("arm", Arm()) == first


@pytest.mark.parametrize("stop", [2, 3])
def test_a_trace_is_the_same_after_a_stop(tiny, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(train, "SAVED_EVERY", 1)
    settings = dataclasses.replace(TINY, tune_steps=5)

    def traced(folder, bar):
        looks = Seed(0, settings, tiny, "cpu", folder, bar).run("arm", Arm(), traced=True)["trace"]
        times = ("layers_seconds", "layers_share")
        return [{k: v for k, v in look.items() if k not in times} for look in looks]

    whole = traced(tmp_path / "whole", no_bar)
    assert [look["step"] for look in whole] == [0, 2, 4, 5]
    steps = []

    @contextmanager
    def stopped(stage, name, number):
        def advance(loss):
            steps.append(stage)
            if steps.count(arm.TUNE) == stop + 1:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        traced(tmp_path / "stopped", stopped)
    assert traced(tmp_path / "stopped", no_bar) == whole


def test_a_trace_has_the_probes_and_the_score_of_the_evaluation(tiny, tmp_path):
    settings = dataclasses.replace(TINY, traced_scenes=TINY.test_scenes)
    metrics = Seed(0, settings, tiny, "cpu", tmp_path, no_bar).run("arm", Arm(None), traced=True)
    last = metrics["trace"][-1]
    assert last["score"] == metrics["accuracy"]
    for layer in (0, 2, 4):
        assert last[f"layer_{layer}/identity"] == results.at(metrics, "identity", layer)
        assert last[f"layer_{layer}/kind"] == results.at(metrics, "probe", layer)
    assert metrics["identity"] != metrics["probe"]


def test_measuring_checks_the_room_and_names_a_full_disk(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(work.psutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    wanted = [("without", 0)]

    def measure():
        arms = {"without": Arm(None)}
        run.measure(arms, wanted, TINY, tiny, "cpu", tmp_path, lambda *k: None, no_bar, 1)

    with pytest.raises(Unavailable, match=r"^disk: training .* needs 5 GB"):
        measure()
    monkeypatch.setattr(run, "check_room", lambda *arguments: None)

    def full(weights, path):
        raise SafetensorError("cannot write")

    monkeypatch.setattr(work, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device \(cannot write\)"):
        measure()


def test_the_demo_as_a_whole(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Pieces, "check", lambda self, llm: None)
    console = screen(width=120)
    settings = dataclasses.replace(TINY, tune_steps=4)
    monkeypatch.setattr(run, "machine", lambda device, jobs: "a machine")
    stopped = tmp_path / "work" / "arms with other options"
    stopped.mkdir(parents=True)
    measured = run.run(settings, Arm({"layer": 3}), 1, tiny, "cpu", tmp_path, console, jobs=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "demo.json",
        "demo.md",
        "demo.html",
        "demo.png",
        *results.TRACES.values(),
        "trace",
        "work",
    }
    assert list((tmp_path / "work").iterdir()) == [stopped]
    assert json.loads((tmp_path / "demo.json").read_text()) == json.loads(json.dumps(measured))
    said = " ".join(console.file.getvalue().split())
    assert texts.SMOKE in said
    for name, _ in results.ARMS.values():
        assert name in said
    page = (tmp_path / "demo.html").read_text()
    assert "Patches decode in the last layer" in page
    logs = [tmp_path / "trace" / name for name in ("without", "with")]
    for metric in ("identity", "kind", "contrast"):
        drawn = trace.draw(logs, None, metric, "score", None, tmp_path / "again.png")
        # Before the first step, at the second, at the fourth, which is the last.
        assert drawn.count(": 3 steps") == 2
