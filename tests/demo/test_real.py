"""The real demo with stand-ins for its parts: photographs that are drawn here, a tiny random LLM,
an encoder of mean colours."""

import dataclasses
import json
import random
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("efficientnet_lite_pytorch")

from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import PreTrainedTokenizerFast as Fast

from pre_kernels.demo import words as texts
from pre_kernels.demo.real import arm, model, photographs, results, run, train, work
from pre_kernels.demo.real.arm import Arm, Seed
from pre_kernels.demo.real.evaluate import Seen, right
from pre_kernels.demo.real.llms import LLMS
from pre_kernels.demo.real.photographs import CATEGORIES
from pre_kernels.demo.real.pieces import Pieces, Unavailable
from pre_kernels.demo.real.scenes import PATCHES, SIDE, Scenes
from pre_kernels.demo.real.settings import QUICK
from pre_kernels.demo.real.text import IGNORED, Batches, caption, questions
from pre_kernels.diagnostics.run import trace

from .support import no_bar, screen

TINY = dataclasses.replace(QUICK, align_steps=2, tune_steps=3, every=1, traced_every=2)
LLM = dataclasses.replace(LLMS["smollm2"], prompt="user:", image_token=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with drawings of 12 things of each category."""
    root = tmp_path_factory.mktemp("parts")
    chance = np.random.default_rng(0)
    for category, name in enumerate(CATEGORIES):
        (root / "stamps" / name / "kind").mkdir(parents=True)
        for number in range(12):
            pixels = np.zeros((150, 120, 4), np.uint8)
            # A category has a colour.
            pixels[10:140, 20:100, category % 3] = 255 - 80 * (category // 3)
            pixels[10:140, 20:100, 3] = 255
            pixels[..., :3] ^= chance.integers(0, 30, (150, 120, 3), dtype=np.uint8)
            path = root / "stamps" / name / "kind" / f"{number}.png"
            Image.fromarray(pixels).save(path)
            path.with_suffix(".txt").write_text(f"Thing {number}.\nde.utf8=Ding\n")
    return root


@pytest.fixture(scope="module")
def found(folder):
    return photographs.load(folder / "stamps")[0]


def tokenizer():
    """Return a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: n for n, word in enumerate(["<end>", "<image>", *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=words, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return Fast(tokenizer_object=bytes_, eos_token="<end>")


class Means(nn.Module):
    """An encoder that sees the mean colour of each patch."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, model.CHANNELS, 1)

    def extract_features(self, pixels):
        return self.mix(nn.functional.avg_pool2d(pixels, SIDE // 7))


def tiny_model(llm, parts, scenes, seed):
    """Return a LLaVA with a random LLM of four layers and a random encoder."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=model.LiteConfig(),
        text_config=text,
        image_token_index=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    made = LlavaForConditionalGeneration(config)
    made.model.vision_tower.fit(scenes)
    made.config.use_cache = False
    return made.eval()


@pytest.fixture
def tiny(monkeypatch, folder):
    """Replace the LLM and the encoder, and return the parts."""
    monkeypatch.setattr(EfficientNet, "from_name", lambda name: Means())
    monkeypatch.setattr(arm, "build", tiny_model)
    monkeypatch.setattr(arm, "_tokenizer", lambda llm, parts: tokenizer())
    monkeypatch.setattr(arm, "CALIBRATION", 4)
    monkeypatch.setitem(LLMS, "smollm2", LLM)
    return Pieces(folder)


def test_photographs_have_names_and_categories(found):
    assert len(found) == 12 * len(CATEGORIES)
    assert {thing.name for thing in found} == {f"thing {number}" for number in range(12)}
    # The transparent margin is cut off, and the larger side has the largest size.
    assert {thing.picture.size for thing in found} == {(69, 112)}


def test_a_file_that_cannot_be_read_is_named(folder, tmp_path):
    kinds = tmp_path / "stamps"
    for name in CATEGORIES:
        (kinds / name).mkdir(parents=True)
        for path in (folder / "stamps" / name / "kind").iterdir():
            (kinds / name / path.name).write_bytes(path.read_bytes())
    (kinds / "food" / "3.png").write_bytes(b"no picture")
    (kinds / "food" / "0_mirror.png").write_bytes(b"not read")
    (kinds / "food" / "4.txt").unlink()
    loaded, broken = photographs.load(kinds)
    assert broken == [str(kinds / "food" / "3.png")]
    assert len(loaded) == 12 * len(CATEGORIES) - 2
    for number in range(5, 12):
        (kinds / "food" / f"{number}.png").unlink()
    with pytest.raises(ValueError, match=r"food: got 3 photographs .*, want 10 or more"):
        photographs.load(kinds)


def test_the_parts_of_a_split_share_nothing(found):
    parts = photographs.split(found, seed=3)
    assert sorted(map(len, parts)) == [12, 18, 42]
    assert {id(thing) for part in parts for thing in part} == {id(thing) for thing in found}
    for part in parts:
        assert {thing.category for thing in part} == set(range(len(CATEGORIES)))
    assert [len(part) for part in parts] == [len(p) for p in photographs.split(found, seed=4)]
    assert parts != photographs.split(found, seed=4)


def test_scenes(found):
    scenes = Scenes(found, 4, seed=5)
    again = Scenes(found, 9, seed=5)
    for scene, same in zip(scenes, again, strict=False):
        assert torch.equal(scene.image, same.image)
        assert scene.image.shape == (3, SIDE, SIDE)
        assert scene.masks.shape == (4, PATCHES)
        assert (scene.masks.sum(0) <= 1).all()
        assert scene.masks.any(1).all()
    assert not torch.equal(scenes[0].image, Scenes(found, 4, seed=6)[0].image)


def test_a_mask_lies_where_the_thing_is(found):
    scene = Scenes(found, 1, seed=0)[0]
    rows = torch.arange(PATCHES) // 7
    columns = torch.arange(PATCHES) % 7
    for place, mask in enumerate(scene.masks):
        # The fourth row and column lie across the middle.
        assert (rows[mask] <= 3 if place < 2 else rows[mask] >= 3).all()
        assert (columns[mask] <= 3 if place % 2 == 0 else columns[mask] >= 3).all()


def test_labels_are_the_answers_alone(found):
    words = tokenizer()
    scenes = Scenes(found, 3, seed=0)
    batch = Batches(words, LLM, questions, scenes)([0, 2])
    start = len("user:") + PATCHES
    kept = batch["logits_to_keep"]
    assert batch["input_ids"].shape[1] == start - 1 + kept
    assert batch["labels"].shape == (2, kept)
    for row, number in enumerate((0, 2)):
        wanted = batch["labels"][row]
        ids = batch["input_ids"][row, -kept:]
        answers = wanted != IGNORED
        assert torch.equal(wanted[answers], ids[answers])
        said = words.decode(ids[answers])
        assert sorted(said.split()) == sorted(
            CATEGORIES[thing.category] for thing in scenes[number].things
        )
        assert batch["attention_mask"][row].sum() == start + (ids != 0).sum() - 1
    text = "".join(part for part, _ in caption(scenes[1], random.Random(0)))
    assert text == f" The picture shows {', '.join(t.name for t in scenes[1].things)}."


def test_identity_is_read_in_other_scenes():
    """A photograph that looks the same in each scene is recognised; noise is not."""
    chance = torch.Generator().manual_seed(0)
    own = torch.randn(5, 16, generator=chance)
    photographs = [number % 5 for number in range(80)]
    scenes = [number // 4 for number in range(80)]
    noise = torch.randn(80, 16, generator=chance)
    means = {0: list(own[photographs] + 0.1 * noise), 1: list(noise)}
    seen = Seen(means, [0] * 80, photographs, scenes)
    assert seen.identity(0, 0.01) == 1.0
    assert seen.identity(1, 0.01) < 0.5
    # The scenes of the first half alone have photograph 4.
    seen = Seen(
        means,
        [0] * 80,
        [p if s < 10 or p < 4 else 3 for p, s in zip(photographs, scenes, strict=True)],
        scenes,
    )
    assert seen.identity(0, 0.01) < 1.0


def test_right_answers():
    logits = torch.eye(5)[torch.tensor([[1, 2, 3, 4]])]
    labels = torch.tensor([[IGNORED, 1, IGNORED, 4]])
    # The token after the first is 1, and the model says 3 for the last.
    assert right(logits, labels) == [True, False]


def test_the_tower_stays_as_it_is(found):
    tower = model.LiteTower(model.LiteConfig())
    scenes = Scenes(found, 3, seed=0)
    tower.fit(scenes, batch=2)
    assert not tower.train().training
    tokens = tower(torch.stack([scene.image for scene in scenes]).float()).hidden_states[-1]
    assert tokens.shape == (3, PATCHES, model.CHANNELS)
    lively = tower.std > 1e-3
    assert tokens.mean((0, 1)).abs().max() < 1e-2
    torch.testing.assert_close(
        tokens.flatten(0, 1).std(0)[lively], torch.ones(int(lively.sum())), atol=1e-2, rtol=0
    )


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


def test_the_verdict_is_that_of_the_numbers():
    layers = [0, 15, 30]

    def metrics(probe, contrast, accuracy):
        return {
            "layers": layers,
            "probe": probe,
            "identity": probe,
            "contrast": contrast,
            "accuracy": accuracy,
            "lens_share": [0.5] * 3,
            "words": [["a"]] * 3,
        }

    start = metrics([0.8, 0.5, 0.4], [2.0, 1.1, 1.1], 0.1)
    seeds = [
        {
            "seed": number,
            "before": start,
            "aligned": start,
            "without": metrics([0.8, 0.6, 0.5], [2.0, 1.1, 1.2], 0.5),
            "with": metrics([0.8, 0.7 + 0.01 * number, 0.5], [2.0, 1.2, 1.2], 0.5),
        }
        for number in range(3)
    ]
    found = {
        "settings": dataclasses.asdict(dataclasses.replace(QUICK, tune_steps=240)),
        "seeds": seeds,
    }
    said = results.verdict(found)
    assert "80 % at the input and 50 % after the last layer after stage two" in said[0]
    assert "0.550 without, 0.605 with PRe, difference +0.055 ± 0.005" in said[1]
    assert "1.150 without, 1.200 with PRe" in said[3]
    assert len(said) == 5
