"""`pre-kernels diagnose`: from a model and images on disk to the report."""

import csv
import math
import shutil

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from pre_kernels.demo.export import processor, save_model
from pre_kernels.demo.scenes import PATCHES
from pre_kernels.diagnostics import LayerReport, measure
from pre_kernels.diagnostics.run import run, samples
from pre_kernels.integrations import Reader

from .support import EACH, Stop, close, diagnose, document, images, interrupted, tiny


def test_end_to_end(there, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        diagnose(
            there / "a",
            there / "images",
            "--masks",
            there / "masks",
            "--compare",
            there / "b",
            "--out",
            out,
        )
        == 0
    )
    report = document(out)
    assert [model["name"] for model in report["models"]] == ["a", "b"]
    for model, seed in zip(report["models"], (0, 1), strict=True):
        loaded = samples.load_samples(
            tiny(seed), processor(), there / "images", masks=there / "masks"
        )
        assert len(loaded) == 10 * EACH
        layers = LayerReport()
        with Reader(tiny(seed)) as reader:
            list(measure(reader, loaded, layers, lens=True))
        for row, wanted in zip(model["runs"][0], layers.rows(), strict=True):
            assert close(row, wanted)
            assert (row["images"], row["tokens"]) == (10 * EACH, 10 * EACH * PATCHES)
            assert None not in (
                row["contrast"],
                row["near"],
                row["cosine"],
                row["cka"],
                row["cknna"],
                row["lens_share"],
            )
            assert row["linear_probe"] is not None
    assert report["data"]["classes"] == [str(digit) for digit in range(10)]
    assert len(report["maps"]) == 3
    for entry in report["maps"]:
        assert entry["grid"] == [6, 6]
        assert [*entry["similarity"]] == ["a", "b"]
        assert entry["layers"] == [0, 1, 2]
        row, column = entry["patch"]
        assert entry["similarity"]["b"][2][row * 6 + column] == 1.0
    rows = list(csv.DictReader((out / "layers.csv").open(encoding="utf-8")))
    assert [(row["model"], row["layer"]) for row in rows] == [
        (m, str(n)) for m in "ab" for n in range(3)
    ]
    assert float(rows[1]["contrast"]) == pytest.approx(
        report["models"][0]["runs"][0][1]["contrast"]
    )
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert "--compare" in page
    said = capsys.readouterr().out
    assert f"the report: {out / 'report.html'}" in said
    assert "Semantic contrast ratio" in said
    assert [path.suffix for path in (out / "parts").iterdir()] == [".json", ".json"]


def test_what_was_measured_is_not_measured_again(there, tmp_path, monkeypatch, capsys):
    settings = (there / "a", there / "images", "--layers", "0,2", "--limit", 10, "--maps", 0)
    assert diagnose(*settings, "--out", tmp_path / "out") == 0
    done = interrupted(monkeypatch, 100, Stop())
    assert diagnose(*settings, "--compare", there / "b", "--out", tmp_path / "out") == 0
    assert len(done) == 10  # b's alone
    assert "a: measured before" in capsys.readouterr().out
    assert diagnose(*settings, "--seed", 1, "--out", tmp_path / "out") == 0
    assert len(done) == 20
    found = document(tmp_path / "out")
    assert [row["layer"] for row in found["models"][0]["runs"][0]] == [0, 2]
    assert found["maps"] == []


@pytest.mark.parametrize("folder", ["out", "."])
def test_a_model_that_was_trained_further_is_measured_again(tmp_path, folder):
    """If --out is the folder of the model, a change of the model still starts a new run."""
    save_model(tiny(0), tmp_path / "a")
    pictures = images(tmp_path / "images", 3)
    out = tmp_path / folder
    assert diagnose(tmp_path / "a", pictures, "--out", out) == 0
    first = document(out)
    save_model(tiny(1), tmp_path / "a")
    assert diagnose(tmp_path / "a", pictures, "--out", out) == 0
    assert document(out)["models"] != first["models"]


@pytest.mark.parametrize("out", ["diagnose-out", "."])
def test_what_is_written_into_the_models_folder_is_not_a_part_of_the_model(
    there, tmp_path, monkeypatch, out
):
    shutil.copytree(there / "a", tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    pictures = images(tmp_path / "images", 3)
    done = interrupted(monkeypatch, 100, Stop())
    for given in (out, tmp_path / "link" / out):
        assert diagnose(".", pictures, "--masks", ".", "--out", given) == 0
    assert len(done) == 3


@pytest.mark.parametrize(
    "error", [ImportError("torchvision"), TypeError("got an unexpected keyword")]
)
def test_what_is_wrong_with_every_image_ends_the_run(there, tmp_path, monkeypatch, error):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr(samples.Preparation, "_process", broken)
    with pytest.raises(type(error)):
        samples.load_samples(tiny(), processor(), images(tmp_path / "images", 2))


def test_nan_is_named(tmp_path, capsys):
    model = tiny()
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight.fill_(math.nan)
    save_model(model, tmp_path / "a")
    assert diagnose(tmp_path / "a", images(tmp_path / "images", 1), "--out", tmp_path / "out") == 2
    assert "a, 0.png: hidden[2]: got nan or infinite values" in capsys.readouterr().err


def test_masks_of_other_images_are_missed(there, tmp_path, capsys):
    pictures = images(tmp_path / "images", 3)
    assert (
        diagnose(there / "a", pictures, "--masks", there / "masks", "--out", tmp_path / "out") == 0
    )
    (model,) = document(tmp_path / "out")["models"]
    assert any("has no mask of any of these images" in note for note in model["notes"])
    assert "masks has no mask of any of these images" in capsys.readouterr().out


def test_one_class_leaves_the_rest_of_the_report(there, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copytree(there / "images" / "3", tmp_path / "images" / "3")
    arguments = ("--masks", there / "masks", "--out", tmp_path / "out")
    assert diagnose(there / "a", tmp_path / "images", *arguments) == 0
    (model,) = document(tmp_path / "out")["models"]
    assert model["runs"][0][0]["linear_probe"] is None
    assert model["runs"][0][0]["contrast"] is not None
    assert any("labels: got a single class, want at least two" in note for note in model["notes"])


def test_a_dtype_can_be_asked_for(there, tmp_path):
    for sample in samples.load_samples(tiny().bfloat16(), processor(), there / "images", limit=10):
        assert sample.inputs["pixel_values"].dtype == torch.bfloat16
        assert sample.inputs["input_ids"].dtype == torch.int64
    pictures = images(tmp_path / "images", 3, "RGB")
    for dtype in ("auto", "bfloat16"):
        assert diagnose(there / "a", pictures, "--dtype", dtype, "--out", tmp_path / dtype) == 0
    exact, rounded = (
        document(tmp_path / dtype)["models"][0]["runs"][0][2] for dtype in ("auto", "bfloat16")
    )
    assert exact["norm_mean"] == pytest.approx(rounded["norm_mean"], rel=0.05)
    assert exact["norm_mean"] != rounded["norm_mean"]


def test_a_model_that_accelerate_places(there, tmp_path):
    pictures = images(tmp_path / "images", 3)
    for device in ("cpu", "spread"):
        assert diagnose(there / "a", pictures, "--device", device, "--out", tmp_path / device) == 0
    one, other = (
        document(tmp_path / device)["models"][0]["runs"][0] for device in ("cpu", "spread")
    )
    assert all(close(a, b) for a, b in zip(one, other, strict=True))


def test_bad_input(there, tmp_path, capsys, monkeypatch):
    pictures = images(tmp_path / "images", 2)

    def error(*arguments):
        assert diagnose(*arguments, "--out", tmp_path / "out") == 2
        return capsys.readouterr().err

    assert "images: " in error(there / "a", tmp_path / "nowhere")
    assert "nowhere-model is not there, want a folder" in error(
        tmp_path / "nowhere-model", pictures
    )
    assert "is not a folder, want one that save_pretrained wrote" in error(
        there / "a" / "config.json", pictures
    )
    assert "layers: got 9 among them, want integers in 0..2" in error(
        there / "a", pictures, "--layers", "0,9"
    )
    assert "masks: " in error(there / "a", pictures, "--masks", tmp_path / "nothing")
    assert "--device: got 'warp'" in error(there / "a", pictures, "--device", "warp")

    tiny().save_pretrained(tmp_path / "bare")
    assert "bare has no processor that can be loaded" in error(tmp_path / "bare", pictures)
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path / "text")
    assert "cannot be loaded as a vision-language model" in error(tmp_path / "text", pictures)

    with pytest.raises(SystemExit):
        diagnose(there / "a", pictures, "--metrics", "everything")
    assert "want some of structure" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        diagnose(there / "a", pictures, "--layers", "all")
    assert "want whole numbers separated by commas" in capsys.readouterr().err

    (tmp_path / "file").write_text("")
    assert diagnose(there / "a", pictures, "--out", tmp_path / "file") == 2
    assert "--out: cannot write into" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "diagnose needs einops, matplotlib" in error(there / "a", pictures)


def test_weights_in_pickles_are_refused(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "a")
    processor().save_pretrained(tmp_path / "a")
    torch.save(tiny().state_dict(), tmp_path / "a" / "pytorch_model.bin")
    (tmp_path / "a" / "model.safetensors").unlink()
    assert diagnose(tmp_path / "a", images(tmp_path / "images", 2), "--out", tmp_path / "out") == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_names_tell_models_apart():
    assert run.names(("x/a", "x/b")) == ["a", "b"]
    assert run.names(("x/with/last", "x/without/last")) == ["with/last", "without/last"]
    assert run.names(("llava", "llava")) == ["llava", "llava"]
