"""Training with LayerCallback: its log agrees with `pre-kernels diagnose` on the checkpoints, and
`trace` draws it."""

import json
import shutil

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from pre_kernels.cli import main
from pre_kernels.demo.export import processor, save_scenes
from pre_kernels.demo.scenes import compose, split_digits
from pre_kernels.demo.text import visual_batch
from pre_kernels.diagnostics.run import trace
from pre_kernels.diagnostics.run.callback import LayerCallback
from pre_kernels.diagnostics.run.samples import load_samples
from pre_kernels.integrations import apply_pre, patch_trainer

from .support import diagnose, document, tiny


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """(the folder of a training of 4 steps with PRe, the folder of its held-out images)."""
    from transformers import Trainer, TrainingArguments

    folder, held_out = tmp_path_factory.mktemp("training"), tmp_path_factory.mktemp("held out")
    digits = split_digits(0)
    save_scenes(digits[2], 4, 0, held_out)
    scenes = compose(digits[0], 16, 0)
    model = tiny()
    handle = apply_pre(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(range(16)),
        data_collator=lambda index: visual_batch(scenes, torch.tensor(index)),
        processing_class=processor(),  # so that checkpoints have it
    )
    samples = load_samples(model, processor(), held_out / "images", masks=held_out / "masks")
    scores = iter([0.1, 0.3, 0.5])
    trainer.add_callback(
        LayerCallback(
            trainer,
            samples,
            every=2,
            layers=(0, 1, 2),
            max_share=None,
            score=lambda model: next(scores),
        )
    )
    with patch_trainer():
        trainer.train()
    handle.remove()
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    return folder, held_out


def test_the_log_is_what_diagnose_finds_in_the_checkpoints(training, tmp_path):
    folder, held_out = training
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    measured = {entry["step"]: entry for entry in log if "layers_seconds" in entry}
    assert [*measured] == [0, 2, 4]
    assert [entry["score"] for entry in measured.values()] == [0.1, 0.3, 0.5]
    for step in (2, 4):
        checkpoint = folder / f"checkpoint-{step}"
        out = tmp_path / str(step)
        assert (
            diagnose(checkpoint, held_out / "images", "--masks", held_out / "masks", "--out", out)
            == 0
        )
        for row in document(out)["models"][0]["runs"][0]:
            for name in (
                "linear_probe",
                "knn_probe",
                "contrast",
                "cohesion",
                "coupling",
                "near",
                "far",
                "cosine",
            ):
                assert measured[step][f"layer_{row['layer']}/{name}"] == pytest.approx(
                    row[name], rel=1e-5
                )
    assert measured[2]["layer_2/contrast"] != pytest.approx(
        measured[4]["layer_2/contrast"], rel=1e-4
    )


def drawn(*arguments):
    return main(["trace", *map(str, arguments)])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_plot_of_a_log(training, tmp_path, suffix, capsys):
    out = tmp_path / f"plot.{suffix}"
    assert drawn(training[0], "--out", out) == 0
    said = capsys.readouterr().out
    assert "3 steps, linear probe, layer 1" in said
    assert "score 0.100 → 0.500" in said
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert out.read_bytes().startswith(start)


def test_the_metric_can_be_chosen_also_by_its_old_name(training, tmp_path, capsys):
    for option in ("--metric", "--figure"):
        assert drawn(training[0], option, "contrast", "--out", tmp_path / "plot.png") == 0
        assert "3 steps, contrast, layer 1" in capsys.readouterr().out


def test_what_is_drawn(training):
    history = trace.history(training[0] / "trainer_state.json")
    logged = trace.run(history, "x", 2, "contrast", "score", None)
    by_step = {entry["step"]: entry for entry in history if "score" in entry}
    assert logged["steps"] == [0, 2, 4]
    assert logged["probe"] == [by_step[step]["layer_2/contrast"] for step in logged["steps"]]
    assert logged["score"] == [0.1, 0.3, 0.5]
    other = trace.run(history, "x", None, "linear_probe", "score", {2: 0.7, 4: 0.8, 9: 0.9})
    assert other["steps"] == [2, 4]
    assert other["score"] == [0.7, 0.8]
    assert other["probe_name"] == "linear probe, layer 1"


def test_what_is_no_number_is_left_out(tmp_path, capsys):
    def log(**change):
        entries = [
            {"step": step, "layer_1/linear_probe": step / 10, "score": step / 5}
            for step in (0, 1, 2, 3)
        ]
        entries = [
            entries[0] | change,
            *entries[1:3],
            entries[3] | change,
            {"layer_1/linear_probe": 0.9, "score": 0.9},
        ]
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
        status = drawn(tmp_path, "--out", tmp_path / "plot.png")
        return status, "".join(capsys.readouterr())

    for change in (
        {"score": None},
        {"score": "high"},
        {"layer_1/linear_probe": float("nan")},
        {"step": "last"},
    ):
        status, said = log(**change)
        assert (
            status,
            said.count("2 steps, linear probe, layer 1 0.100 → 0.200, score 0.200 → 0.400"),
        ) == (0, 1)
    assert (
        "4 steps, linear probe, layer 1"
        in log(**{"layer_x/linear_probe": 1, "layer_/linear_probe": 1})[1]
    )

    for entries in ({"a": 1}, ["a"], None):
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
        assert drawn(tmp_path) == 2
        assert (
            f"log: cannot read {tmp_path / 'trainer_state.json'}, want the"
            in capsys.readouterr().err
        )
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "layer_1/linear_probe": 0.5, "score": "high"}]})
    )
    assert drawn(tmp_path) == 2
    said = capsys.readouterr().err
    assert (
        f"{tmp_path.name} has no step with both 'layer_1/linear_probe' (1 steps) and 'score' (0) "
        "as numbers" in said
    )


def test_the_last_checkpoint_of_a_folder_is_read(training, tmp_path):
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name).mkdir()
        shutil.copy(training[0] / name / "trainer_state.json", tmp_path / name)
    assert max(entry["step"] for entry in trace.history(tmp_path)) == 4


def test_two_runs_with_scores_from_elsewhere(training, tmp_path, capsys):
    for name, rise in (("a", 0.1), ("b", 0.2)):
        (tmp_path / f"{name}.csv").write_text(
            "step,score\n" + "".join(f"{s},{s * rise}\n" for s in (0, 2, 4))
        )
        (tmp_path / name).mkdir()
        shutil.copy(training[0] / "trainer_state.json", tmp_path / name)
    scores = ("--scores", tmp_path / "a.csv", tmp_path / "b.csv")
    assert (
        drawn(tmp_path / "a", tmp_path / "b", "--layer", 2, *scores, "--out", tmp_path / "both.svg")
        == 0
    )
    assert "b: 3 steps" in capsys.readouterr().out


def test_bad_input(training, tmp_path, capsys):
    def error(*arguments):
        assert drawn(*arguments) == 2
        return capsys.readouterr().err

    folder = training[0]
    assert "want a name that ends in .png" in error(folder, "--out", tmp_path / "plot.jpeg")
    assert f"log: {tmp_path} has no trainer_state.json, neither itself nor in a folder" in error(
        tmp_path, "--out", tmp_path / "plot.png"
    )
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"loss": 1.0, "step": 1}]}')
    assert "has no metric 'linear_probe' of a layer" in error(
        tmp_path, "--out", tmp_path / "plot.png"
    )
    (tmp_path / "trainer_state.json").write_text("[]")
    assert "log: cannot read" in error(tmp_path, "--out", tmp_path / "plot.png")
    assert "layer: got 7, want one of those" in error(
        folder, "--layer", 7, "--out", tmp_path / "plot.png"
    )
    assert "no step with both 'layer_1/linear_probe' (3 steps) and 'eval_x' (0)" in error(
        folder, "--score", "eval_x", "--out", tmp_path / "plot.png"
    )
    assert "scores: got 1 files for 2 logs" in error(folder, folder, "--scores", tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("step,score\n1,none\n")
    assert "scores: cannot read" in error(
        folder, "--scores", tmp_path / "a.csv", "--out", tmp_path / "plot.png"
    )
    assert "out: " in error(folder, "--out", tmp_path / "nowhere" / "plot.png")
    assert not list(tmp_path.glob("plot*"))


def write(folder, entries):
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    return folder


def entries(with_pre, steps=100, task=True):
    """Logs of a training; the task loss is 4 - step / 50."""
    made = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": 4 - step / 50}
        if with_pre:
            entry |= {"loss": 4 - step / 50 - 0.4, "pre_loss": -0.8}
            entry |= {"task_loss": 4 - step / 50} if task else {}
        made.append(entry)
    return [*made, {"step": steps, "train_loss": 1.0}, {"step": steps, "eval_loss": 9.0}]


def test_losses_of_two_runs(tmp_path, capsys):
    """Without PRe the log has only loss, which is the task loss."""
    without, with_pre = (write(tmp_path / n, entries(n == "with")) for n in ("without", "with"))
    out = tmp_path / "loss.png"
    assert drawn(without, with_pre / "trainer_state.json", "--loss", "--out", out) == 0
    said = capsys.readouterr().out.splitlines()
    line = "steps 1 to 100, 100 logged, task loss 3.9800 → 2.0000"
    assert said == [f"without: {line}", f"with: {line}", f"the plot: {out}"]
    assert out.read_bytes().startswith(b"\x89PNG")

    runs = [trace.Losses(trace.history(folder), folder.name) for folder in (without, with_pre)]
    assert runs[0].values == runs[1].values
    (axes,) = trace.loss_plot(runs).axes
    assert axes.get_ylabel() == "task loss (without λ·L_PRe)"
    assert axes.get_xlabel() == "optimizer step"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["without", "with"]
    raw, smooth, *others = axes.lines
    assert len(others) == 2
    assert [*raw.get_ydata()] == [*runs[0].values.values()]
    assert raw.get_alpha() < 0.5 < (smooth.get_alpha() or 1)


def test_smoothing_keeps_ends_and_straight_lines():
    line = [float(n) for n in range(100)]
    assert trace.smoothed(line) == pytest.approx(line)
    noisy = [(-1.0) ** n for n in range(100)]
    assert trace.smoothed(noisy)[50] == pytest.approx(0.2)  # the mean of 5
    assert trace.smoothed([1.0, 5.0]) == [1.0, 5.0]
    assert trace.smoothed(noisy)[0] == 1.0


def test_a_log_of_before_task_loss(tmp_path, capsys):
    """Its curve contains λ·L_PRe, which the line and the legend say; text-only steps do not."""
    old = write(tmp_path / "old", entries(True, task=False))
    assert drawn(old, "--loss", "--out", tmp_path / "loss.svg") == 0
    said = capsys.readouterr().out
    assert "old: steps 1 to 100, 100 logged, loss 3.5800 → 1.6000; this curve contains" in said
    (axes,) = trace.loss_plot([trace.Losses(trace.history(old), "old")]).axes
    (text,) = axes.get_legend().get_texts()
    assert text.get_text() == "old (contains λ·L_PRe)"


def test_steps_whose_task_loss_is_not_known(tmp_path, capsys):
    log = entries(True)
    del log[1]["task_loss"]
    del log[2]["task_loss"], log[2]["pre_loss"]  # text only
    some = write(tmp_path / "some", log)
    assert drawn(some, "--loss", "--out", tmp_path / "loss.png") == 0
    said = capsys.readouterr().out
    assert "99 logged, task loss 3.9800 → 2.0000; 1 steps with pre_loss but no task_loss" in said
    values = trace.Losses(trace.history(some), "some").values
    assert 2 not in values
    assert values[3] == log[2]["loss"]


def test_bad_input_of_losses(tmp_path, capsys, monkeypatch):
    def error(*arguments):
        assert drawn(*arguments, "--loss") == 2
        return capsys.readouterr().err

    folder = write(tmp_path / "run", entries(False))
    empty = write(tmp_path / "empty", [{"step": 1, "eval_loss": 1.0}, {"step": 2, "loss": "nan"}])
    nan = write(tmp_path / "nan", [{"step": 1, "loss": float("nan")}])
    for log in (empty, nan):
        assert f"log: got no loss that is a number in {log.name}, want" in error(folder, log)
    assert f"log: {tmp_path / 'nowhere'} is not there, want" in error(tmp_path / "nowhere")
    (tmp_path / "dots" / "checkpoint-5").mkdir(parents=True)
    assert f"log: {tmp_path / 'dots'} has no trainer_state.json" in error(tmp_path / "dots")
    assert "want a name that ends in .png" in error(folder, "--out", tmp_path / "plot.jpeg")
    assert "out: " in error(folder, "--out", tmp_path / "nowhere" / "plot.png")
    for option, value in (("layer", 3), ("metric", "contrast"), ("score", "x"), ("scores", "x")):
        assert f"--{option}: got" in error(folder, f"--{option}", value)
    assert not list(tmp_path.rglob("*.png"))
    monkeypatch.chdir(tmp_path)
    assert drawn(folder, "--loss") == 0
    assert (tmp_path / "loss.png").exists()


def test_a_training_logs_its_task_loss(training, capsys, tmp_path):
    assert drawn(training[0], "--loss", "--out", tmp_path / "loss.png") == 0
    said = capsys.readouterr().out
    assert "steps 1 to 4, 4 logged, task loss" in said
    assert "contains" not in said
