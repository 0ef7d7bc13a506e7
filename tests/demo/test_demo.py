from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from pre_kernels.demo import compare, export, plot, results, stages
from pre_kernels.demo import scenes as sc
from pre_kernels.demo.evaluate import states
from pre_kernels.demo.settings import HEADS
from pre_kernels.demo.text import (
    BEGIN,
    IGNORED,
    IMAGE,
    QUESTION,
    library_source,
    text_batch,
    visual_batch,
)

from .support import TINY, committed, no_bar


def test_parts_of_the_digits_are_disjoint_and_complete():
    parts = sc.split_digits(seed=0)
    together = [int(i) for part in parts for i in part]
    assert len(together) == len(set(together)) == 1797
    assert [len(p) for p in parts] == pytest.approx([988, 404, 405], abs=1)
    assert all((a == b).all() for a, b in zip(parts, sc.split_digits(seed=0), strict=True))
    assert (parts[0] != sc.split_digits(seed=1)[0]).any()


def test_scenes_use_only_their_part():
    training, fitting, test = (sc.compose(p, 50, seed=0) for p in sc.split_digits(seed=0))
    numbers = [set(s.sources.flatten().tolist()) for s in (training, fitting, test)]
    assert not numbers[0] & numbers[1]
    assert not (numbers[0] | numbers[1]) & numbers[2]


def test_a_scene_is_made_of_its_digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    scenes = sc.compose(sc.split_digits(0)[0], 5, seed=3)
    assert scenes.images.shape == (5, 3, sc.SIDE, sc.SIDE)
    assert 0 <= scenes.images.min() <= scenes.images.max() <= 1
    for s in range(5):
        for k in range(sc.OBJECTS):
            down, right = divmod(k, sc.GRID)
            cell = scenes.images[s, :, down * 8 : down * 8 + 8, right * 8 : right * 8 + 8]
            expected = torch.from_numpy(data.images[scenes.sources[s, k]]).float() / 16
            assert torch.equal(cell, expected.expand(3, -1, -1))
            assert scenes.digits[s, k] == data.target[scenes.sources[s, k]]


def test_composition_follows_the_seed():
    part = sc.split_digits(0)[0]
    assert torch.equal(sc.compose(part, 5, seed=1).images, sc.compose(part, 5, seed=1).images)
    assert not torch.equal(sc.compose(part, 5, seed=1).sources, sc.compose(part, 5, seed=2).sources)


def test_regions_are_where_the_digits_lie():
    assert sc.masks().sum(1).tolist() == [4] * sc.OBJECTS
    assert (sc.masks().sum(0) == 1).all()
    scenes = sc.compose(sc.split_digits(0)[0], 1, seed=0)
    for k, mask in enumerate(sc.masks()):
        pixels = (
            mask.view(sc.SIDE // sc.PATCH, -1)
            .repeat_interleave(sc.PATCH, 0)
            .repeat_interleave(sc.PATCH, 1)
        )
        down, right = divmod(k, sc.GRID)
        cell = scenes.images[0, 0, down * 8 : down * 8 + 8, right * 8 : right * 8 + 8]
        assert torch.equal(scenes.images[0, 0][pixels], cell.flatten())


def test_the_question_asks_for_the_parity_of_the_middle_digit():
    scenes = sc.compose(sc.split_digits(0)[0], 30, seed=0)
    batch = visual_batch(scenes, torch.arange(30))
    assert (batch["input_ids"] == IMAGE).sum(1).tolist() == [sc.PATCHES] * 30
    asked = bytes(batch["input_ids"][0, 1 + sc.PATCHES : -1].tolist())
    assert asked == QUESTION
    said = [chr(i) for i in batch["input_ids"][:, -1].tolist()]
    assert said == ["y" if d % 2 else "n" for d in scenes.digits[:, sc.MIDDLE].tolist()]
    assert (batch["labels"][:, :-1] == IGNORED).all()
    assert torch.equal(batch["labels"][:, -1], batch["input_ids"][:, -1])


def test_text_is_the_standard_library():
    corpus = library_source(3000)
    assert corpus.shape == (3000,)
    assert b"import" in bytes(corpus.tolist())
    ids = text_batch(corpus, 4, 10, torch.Generator().manual_seed(0))
    assert ids.shape == (4, 11)
    assert (ids[:, 0] == BEGIN).all()
    assert bytes(ids[0, 1:].tolist()) in bytes(corpus.tolist())


def test_the_saved_models_are_those_that_were_measured(tmp_path):
    from transformers import AutoModelForImageTextToText

    kept = export.Kept(tmp_path)
    run = []

    @contextmanager
    def bar(stage, name, steps):
        run.append([stage, 0])
        yield lambda loss: run.append([stage, run.pop()[1] + 1])

    found = compare.run_seed(0, TINY, "cpu", kept.model, bar)
    assert not kept.problems
    assert [(stage, steps) for stage, steps in run] == [*stages.of_a_seed(TINY)]
    test = sc.compose(sc.split_digits(0)[2], TINY.test_scenes, 0)
    for arm in ("before", "without", "with"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "models" / arm)
        assert states(model, test).correct.double().mean().item() == found[arm]["accuracy"]


def test_a_saved_scene_enters_the_model_as_in_training(tmp_path, monkeypatch):
    from PIL import Image
    from sklearn.datasets import load_digits

    chosen = []
    monkeypatch.setattr(
        export, "drawn", lambda sources: chosen.append(sources) or sc.drawn(sources)
    )
    export.save_scenes(sc.split_digits(0)[2], 2, 0, tmp_path)
    for digit, taken in enumerate(chosen):
        matches = load_digits().target[taken] == digit
        assert matches[:, sc.MIDDLE].all()
        assert (matches.sum(1) >= 5).all()
    files = sorted((tmp_path / "images").rglob("*.png"))
    assert [file.relative_to(tmp_path / "images").parts[0] for file in files] == [
        str(n // 2) for n in range(20)
    ]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files]) / 255
    processor = export.processor()
    message = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": QUESTION.decode()}],
        }
    ]
    text = processor.apply_chat_template(message)
    inputs = processor(
        images=[Image.open(files[5]).convert("RGB")], text=[text], return_tensors="pt"
    )
    expected = visual_batch(sc.compose(sc.split_digits(0)[0], 1, 0), torch.arange(1))
    assert torch.equal(inputs["input_ids"], expected["input_ids"][:, :-1])
    torch.testing.assert_close(inputs["pixel_values"], pixels[5].expand(1, 3, -1, -1))
    # The digits' values are sixteenths.
    assert ((pixels * 16) - (pixels * 16).round()).abs().max() < 16 * 0.5 / 255 + 1e-6
    mask = torch.from_numpy(np.array(Image.open(tmp_path / "masks" / "1" / "000.png")))
    assert torch.equal(mask[:: sc.PATCH, :: sc.PATCH].flatten(), sc.regions() + 1)


def pretrained(seed=0):
    training = sc.compose(sc.split_digits(seed)[0], TINY.train_scenes, seed)
    return training, compare.pretrained(training, TINY, seed, "cpu", no_bar)


def test_the_model_is_a_plain_llava_again_after_training_with_pre():
    scenes, model = pretrained()
    names = list(model.state_dict())
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    compare.run_arm("with PRe", {}, model, (scenes, scenes, scenes), TINY, 0, no_bar)
    assert list(model.state_dict()) == names
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_the_arms_differ_in_nothing_but_pre():
    # Both start alike and see the same batches in the same order. So with a vanishing weight the
    # two runs are the same.
    found = compare.run_seed(1, replace(TINY, weight=1e-12), "cpu", None, no_bar)
    a, b = found["without"], found["with"]
    assert a["probe"] == pytest.approx(b["probe"], abs=1e-6)
    assert a["contrast"] == pytest.approx(b["contrast"], rel=1e-4)
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    weighted = compare.run_seed(1, replace(TINY, weight=100.0), "cpu", None, no_bar)
    assert weighted["without"]["contrast"] == pytest.approx(a["contrast"], rel=1e-4)
    assert weighted["with"]["contrast"] != pytest.approx(b["contrast"], rel=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_a_related_work(name, monkeypatch):
    heads = []
    real = compare.evaluate
    monkeypatch.setattr(compare, "evaluate", lambda *a: heads.append(a[4]) or real(*a))
    tiny = replace(TINY, head=name)
    compare.run_seed(0, tiny, "cpu", None, no_bar)
    (head,) = filter(None, heads)
    wanted = {"depth": 2, "norm": None, "activation": "gelu"} | HEADS[name]
    assert {key: getattr(head, key) for key in wanted} == wanted
    shown = results.caption({"settings": vars(tiny) | {"layer": 1}, "seeds": [{"seed": 0}]})
    assert (f"with the head of {name}." in shown) == (name != "pre")


def test_an_answer_is_correct_if_the_model_would_generate_it():
    _, model = pretrained()
    scenes = sc.compose(sc.split_digits(0)[2], 30, seed=0)
    # A head that only says "y" or "n", by the sign of the last state's first entry.
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[ord("y"), 0], model.lm_head.weight[ord("n"), 0] = 1.0, -1.0
    batch = visual_batch(scenes, torch.arange(30))
    prompt = {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask")}
    said = model.generate(
        **prompt, pixel_values=batch["pixel_values"], max_new_tokens=1, do_sample=False
    )
    expected = said[:, -1] == batch["input_ids"][:, -1]
    assert 0 < expected.sum() < 30
    assert torch.equal(states(model, scenes).correct, expected)


def test_states_are_those_that_the_layers_made():
    _, model = pretrained()
    scenes = sc.compose(sc.split_digits(0)[2], 6, seed=0)
    activations = states(model, scenes, batch=4)
    with torch.no_grad():
        output = model(**visual_batch(scenes, torch.arange(6)), output_hidden_states=True)
    visual = slice(1, 1 + sc.PATCHES)
    # The last hidden state is after the final norm, so it is not compared.
    for layer in range(TINY.layers):
        torch.testing.assert_close(
            activations.hidden[layer], output.hidden_states[layer][:, visual]
        )
    last = model.model.language_model.norm(activations.hidden[TINY.layers])
    torch.testing.assert_close(last, output.hidden_states[TINY.layers][:, visual])
    objects = activations.objects(1).view(6, sc.OBJECTS, -1)
    torch.testing.assert_close(objects[:, 0], activations.hidden[1][:, sc.regions() == 0].mean(1))


def test_the_report_has_the_metrics_of_the_seeds(tmp_path):
    measurements = committed()
    shown = results.document(measurements)
    assert [model["name"] for model in shown["models"]] == [
        "before visual training",
        "without PRe",
        "with PRe",
    ]
    for model, arm in zip(shown["models"], ("before", "without", "with"), strict=True):
        for rows, seed in zip(model["runs"], measurements["seeds"], strict=True):
            assert [row["layer"] for row in rows] == [*range(9)]
            for column, name in (
                ("linear_probe", "probe"),
                ("contrast", "contrast"),
                ("coupling", "coupling"),
            ):
                assert [row[column] for row in rows] == seed[arm][name]
    results.save(measurements, tmp_path)
    page = (tmp_path / "demo.html").read_text()
    assert shown["curves"][0]["label"] in page


def test_the_plot_has_probe_contrast_and_the_loss_along_training(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    measurements = committed()
    plot.draw(results.document(measurements), tmp_path / "demo.png")
    probe, contrast, training = drawn[0].axes
    for axes, key in ((probe, "probe"), (contrast, "contrast")):
        shown = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
        for name, arm in (
            ("before visual training", "before"),
            ("without PRe", "without"),
            ("with PRe", "with"),
        ):
            assert shown[name] == pytest.approx(
                torch.tensor([s[arm][key] for s in measurements["seeds"]]).mean(0).tolist()
            )
    curves = [list(line.get_ydata()) for line in training.get_lines()][:2]
    assert curves == [seed["with"]["train_pre_loss"] for seed in measurements["seeds"]]
    assert [30, 30] in [list(line.get_xdata()) for line in training.get_lines()]
