"""A run of `pre-kernels diagnose` that is interrupted and resumes counts every image once."""

import re
import shutil

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from pre_kernels.diagnostics.measures.moments import Moments
from pre_kernels.diagnostics.run import parts, run

from ...slow import thinned
from .support import EACH, Stop, close, diagnose, document, interrupted


def test_an_interrupted_run_resumes(there, tmp_path, monkeypatch, capsys):
    pictures = shutil.copytree(there / "images", tmp_path / "images")
    for digit in range(5):  # among the first, too
        (pictures / str(digit) / "broken.png").write_bytes(b"")
    settings = (there / "a", pictures, "--masks", there / "masks")
    assert diagnose(*settings, "--out", tmp_path / "whole") == 0
    interrupted(monkeypatch, 7, KeyboardInterrupt())
    assert diagnose(*settings, "--out", tmp_path / "parted") == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert not (tmp_path / "parted" / "report.html").exists()
    done = interrupted(monkeypatch, 5, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        diagnose(*settings, "--out", tmp_path / "parted")
    assert len(done) == 5
    capsys.readouterr()
    done = interrupted(monkeypatch, 100, Stop())
    assert diagnose(*settings, "--out", tmp_path / "parted") == 0
    assert len(done) == 10 * EACH - 7 - 5
    assert re.search(r"a: resuming after 1[3-7] of 25 images", capsys.readouterr().out)
    whole, parted = document(tmp_path / "whole"), document(tmp_path / "parted")
    for row, other in zip(
        whole["models"][0]["runs"][0], parted["models"][0]["runs"][0], strict=True
    ):
        assert close(row, other)
    assert whole["maps"] == parted["maps"]


@pytest.mark.parametrize("saved", thinned([4, 0], 2))
@pytest.mark.parametrize(
    ("place", "name", "call"), [(Moments, "add", 7 * 4 + 4), (run, "heat_map", 5)]
)
def test_an_image_that_was_half_added_is_not_added_twice(
    there, tmp_path, monkeypatch, place, name, call, saved
):
    """The run is interrupted within the fifth image: while its second layer is added, or after all
    its layers are added but before it is counted."""
    settings = (there / "a", there / "images", "--maps", 5)
    assert diagnose(*settings, "--out", tmp_path / "whole") == 0
    real = getattr(place, name)
    calls = []

    def stopped(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stopped)
        if saved:
            patch.setattr(run.Saver, "now_and_then", lambda self: self.save())
        assert diagnose(*settings, "--out", tmp_path / "parted") == 130
    done = interrupted(monkeypatch, 100, Stop())
    assert diagnose(*settings, "--out", tmp_path / "parted") == 0
    assert len(done) == 10 * EACH - saved
    whole, parted = document(tmp_path / "whole"), document(tmp_path / "parted")
    for row, other in zip(
        whole["models"][0]["runs"][0], parted["models"][0]["runs"][0], strict=True
    ):
        assert close(row, other)
    assert whole["maps"] == parted["maps"]


def test_saving_takes_a_small_part_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(parts.time, "monotonic", lambda: now[0])
    saved = []

    def save():
        now[0] += 6.0
        saved.append(now[0])

    saver = parts.Saver(save, pytest.fail)
    while now[0] < 3600:
        now[0] += 1.0
        saver.now_and_then()
    assert 6.0 * len(saved) <= 1.05 * parts.SAVING * 3600
    assert len(saved) > 20
