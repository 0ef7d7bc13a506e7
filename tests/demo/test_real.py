"""The pieces of the real demo: photographs, scenes, texts, measures and words."""

import dataclasses
import random

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("efficientnet_lite_pytorch")

from pre_kernels.demo.real import model, photographs, results
from pre_kernels.demo.real.evaluate import Seen, right
from pre_kernels.demo.real.photographs import CATEGORIES
from pre_kernels.demo.real.scenes import PATCHES, SIDE, Scenes
from pre_kernels.demo.real.settings import QUICK
from pre_kernels.demo.real.text import IGNORED, Batches, caption, questions

from .stand_ins import LLM, tokenizer


@pytest.fixture(scope="module")
def found(folder):
    return photographs.load(folder / "stamps")[0]


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
