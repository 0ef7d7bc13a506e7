"""Images that cannot be read, or that a processor refuses: left out, named and counted."""

import pytest
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from pre_kernels.demo.export import processor
from pre_kernels.diagnostics.run import samples

from .support import Stop, close, diagnose, document, images, interrupted, tiny


def test_images_that_cannot_be_read_are_left_out_and_named(there, tmp_path, capsys):
    pictures = images(tmp_path / "images", 4)
    (pictures / "broken.png").write_bytes(b"\x89PNG no more")
    assert diagnose(there / "a", pictures, "--out", tmp_path / "out") == 0
    (model,) = document(tmp_path / "out")["models"]
    assert model["runs"][0][0]["images"] == 4
    assert model["notes"][0] == "1 images could not be read: broken.png"
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
        assert read == "1 images could not be read: broken.png"
        number, names = refused.split(" images were refused by the model's processor: ")
        assert number == "3"
        assert sorted(names.split(", ")) == ["00.png", "20.png", "99.png"]
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
        "can be used: 1 images could not be read: broken.png; 3 images were refused by the model's "
        "processor: "
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
        r"images: none of the 4 in .* can be used: 1 images could not be read: broken.png; "
        r"3 images were refused"
    )
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=wanted):
        samples.load_samples(tiny(), processor(), pictures)
