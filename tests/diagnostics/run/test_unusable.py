"""Images that cannot be read, or that a processor refuses, and masks that cannot be used: left out,
named and counted."""

import pytest
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from pre_kernels.demo.export import processor
from pre_kernels.diagnostics.run import left_out, samples
from pre_kernels.diagnostics.run.data import Item

from .support import Stop, close, diagnose, document, images, interrupted, tiny


def test_images_that_cannot_be_read_are_left_out_and_named(there, tmp_path, capsys):
    pictures = images(tmp_path / "images", 4)
    (pictures / "broken.png").write_bytes(b"\x89PNG no more")
    assert diagnose(there / "a", pictures, "--out", tmp_path / "out") == 0
    (model,) = document(tmp_path / "out")["models"]
    assert model["runs"][0][0]["images"] == 4
    assert model["notes"][0] == "images that could not be read: 1 (broken.png)"
    data = document(tmp_path / "out")["data"]
    assert (data["images"], data["listed"], data["labelled"]) == (4, 5, 0)
    assert data["left_out"] == {"images that could not be read": ["broken.png"]}
    assert "broken.png" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "left out: images: cannot read" in capsys.readouterr().out

    for path in pictures.glob("?.png"):
        path.unlink()
    assert diagnose(there / "a", pictures, "--out", tmp_path / "out") == 2
    assert "images: none of the 1 in" in capsys.readouterr().err


@pytest.fixture
def narrow(monkeypatch):
    """Processors that refuse long and thin images, as that of Qwen2-VL does, and fail on images
    that are too small."""
    process = samples.Preparation._process

    def limited(self, image, **options):
        if (ratio := max(image.size) / min(image.size)) > 200:
            raise ValueError(f"absolute aspect ratio must be smaller than 200, got {ratio}")
        1 / (image.width - 1)
        return process(self, image, **options)

    monkeypatch.setattr(samples.Preparation, "_process", limited)


def thin(folder):
    """Refused images and a broken one come before, between and after usable images."""
    for name, size in (("00.png", (1, 300)), ("20.png", (300, 1)), ("99.png", (1, 1))):
        Image.new("L", size).save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    return folder


def test_images_that_the_processor_refuses_are_left_out_and_named(there, tmp_path, capsys, narrow):
    pictures = images(tmp_path / "images", 4)
    assert diagnose(there / "a", pictures, "--out", tmp_path / "plain") == 0
    thin(pictures)
    assert diagnose(there / "a", pictures, "--compare", there / "b", "--out", tmp_path / "out") == 0
    (plain,) = document(tmp_path / "plain")["models"]
    for model in document(tmp_path / "out")["models"]:
        assert model["runs"][0][0]["images"] == 4
        read, refused = model["notes"][:2]
        assert read == "images that could not be read: 1 (broken.png)"
        _, names = refused.split("images that the model's processor refused: 3 ")
        assert sorted(names.strip("()").split(", ")) == ["00.png", "20.png", "99.png"]
    assert document(tmp_path / "out")["data"]["images"] == 4
    first = document(tmp_path / "out")["models"][0]["runs"][0]
    for row, wanted in zip(first, plain["runs"][0], strict=True):
        assert row["norm_mean"] == pytest.approx(wanted["norm_mean"], rel=1e-6)
    assert "20.png" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert said.count("left out: images: ") == 2 * 4
    assert (
        f"LlavaProcessor refuses {pictures / '20.png'}: ValueError: absolute aspect ratio" in said
    )
    assert f"LlavaProcessor refuses {pictures / '99.png'}: ZeroDivisionError: " in said

    for path in pictures.glob("?.png"):
        path.unlink()
    assert diagnose(there / "a", pictures, "--out", tmp_path / "out") == 2
    wanted = (
        "can be used: images that could not be read: 1 (broken.png); images that the model's "
        "processor refused: 3 ("
    )
    assert wanted in capsys.readouterr().err


def test_an_interrupted_run_resumes_after_refused_images(there, tmp_path, monkeypatch, narrow):
    pictures = thin(images(tmp_path / "images", 6))
    settings = (there / "a", pictures)
    assert diagnose(*settings, "--out", tmp_path / "whole") == 0
    interrupted(monkeypatch, 3, KeyboardInterrupt())
    assert diagnose(*settings, "--out", tmp_path / "parted") == 130
    done = interrupted(monkeypatch, 100, Stop())
    assert diagnose(*settings, "--out", tmp_path / "parted") == 0
    assert len(done) == 3
    (whole,), (parted,) = (document(tmp_path / out)["models"] for out in ("whole", "parted"))
    assert whole["notes"] == parted["notes"]
    assert all(close(a, b) for a, b in zip(whole["runs"][0], parted["runs"][0], strict=True))


def test_samples_leave_out_what_cannot_be_used(tmp_path, narrow):
    pictures = thin(images(tmp_path / "images", 4))
    with pytest.warns(UserWarning, match="left out: images: ") as said:
        loaded = samples.load_samples(tiny(), processor(), pictures)
    assert len(loaded) == 4
    texts = sorted(str(w.message) for w in said if str(w.message).startswith("left out"))
    assert [
        name
        for name in ("00.png", "20.png", "99.png", "broken.png")
        if any(name in text for text in texts)
    ]
    assert len(texts) == 4
    for path in pictures.glob("?.png"):
        path.unlink()
    wanted = (
        r"images: none of the 4 in .* can be used: images that could not be read: 1 "
        r"\(broken.png\); images that the model's processor refused: 3 "
    )
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=wanted):
        samples.load_samples(tiny(), processor(), pictures)


EMPTY = "masks without an object"
UNREADABLE = "masks that could not be read"
SIZE = "masks of another size than their image"


@pytest.fixture
def masked(tmp_path):
    """Five images and a mask for each. Those of 0 to 2 are unreadable, of another size, and without
    an object."""
    pictures = images(tmp_path / "images", 5)
    (tmp_path / "masks").mkdir()
    for index in range(5):
        mask = Image.new("L", (12 if index == 1 else 24, 24), 0)
        mask.paste(1, (0, 0, 12, 24))
        mask.paste(2, (12, 0, 24, 24))
        if index == 2:
            mask = Image.new("L", (24, 24), 255)
        mask.save(tmp_path / "masks" / f"{index}.png")
    (tmp_path / "masks" / "0.png").write_bytes(b"\x89PNG no more")
    return pictures


def test_an_image_whose_mask_cannot_be_used_is_measured_without_it(there, tmp_path, capsys, masked):
    masks = tmp_path / "masks"
    assert diagnose(there / "a", masked, "--masks", masks, "--out", tmp_path / "out") == 0
    report = document(tmp_path / "out")
    assert report["data"]["images"] == report["data"]["listed"] == 5
    assert report["data"]["masks"] == f"{masks} (of 2 images)"
    assert report["data"]["left_out"] == {UNREADABLE: ["0.png"], SIZE: ["1.png"], EMPTY: ["2.png"]}
    (model,) = report["models"]
    assert model["notes"][:3] == [
        f"{UNREADABLE}: 1 (0.png)",
        f"{SIZE}: 1 (1.png)",
        f"{EMPTY}: 1 (2.png)",
    ]
    row = model["runs"][0][0]
    assert row["images"] == 5
    assert row["contrast"] is not None
    said = capsys.readouterr().out
    for wanted in (
        f"left out: masks: cannot read {masks / '0.png'} as an image",
        f"left out: masks: {masks / '1.png'} is 12 x 24 pixels",
        "left out: masks: got no object of half a patch or more in the mask of 2.png",
    ):
        assert wanted in said

    with pytest.warns(UserWarning, match="left out: masks: ") as warned:
        loaded = samples.load_samples(tiny(), processor(), masked, masks=masks)
    assert len([w for w in warned if str(w.message).startswith("left out")]) == 3
    assert [sample.masks is None for sample in loaded].count(True) == 3
    assert len(loaded) == 5
    prepare = samples.Preparation(tiny(), processor(), samples.open_masks(masks))
    with pytest.raises(left_out.Unusable, match=r"masks: .*1\.png is 12 x 24 pixels") as error:
        prepare(Item(masked / "1.png", "1.png", None))
    assert error.value.reason == "mask_size"


def test_masks_of_which_none_can_be_used(there, tmp_path, capsys, masked):
    for index in range(5):
        (tmp_path / "masks" / f"{index}.png").write_bytes(b"")
    arguments = ("--masks", tmp_path / "masks", "--out", tmp_path / "out")
    assert diagnose(there / "a", masked, *arguments) == 0
    report = document(tmp_path / "out")
    assert (
        f"none of the 5 masks in {tmp_path / 'masks'} can be used" in (report["models"][0]["notes"])
    )
    assert len(report["data"]["left_out"][UNREADABLE]) == 5
    said = capsys.readouterr().out
    assert said.count("left out: masks: cannot read") == left_out.NAMED
    assert f"left out: more {UNREADABLE}, only counted from here on" in said
    assert f"left out: 5 {UNREADABLE}" in said
    assert "masks: none of the 5 masks in" in said


def test_what_is_left_out_is_named_once_and_counted():
    said = []
    tally = left_out.Tally([("0.png", "unreadable")], said.append)
    for number in range(1, 6):
        tally.add(f"{number}.png", left_out.Unusable("unreadable", f"message {number}"))
    tally.add("0.png", left_out.Unusable("mask_size", "a mask"))
    tally.close()
    text = "images that could not be read"
    assert said == [
        "message 1",
        "message 2",
        f"more {text}, only counted from here on",
        "a mask",
        f"6 {text}",
    ]
    # A run that was stopped between the two counts of an image names it again.
    names = [*tally.left_out, ("0.png", "mask_size")]
    assert left_out.counted(names) == [
        f"{text}: 6 (0.png, 1.png, 2.png, …)",
        "masks of another size than their image: 1 (0.png)",
    ]
    assert left_out.images_of(names) == {f"{number}.png" for number in range(6)}
