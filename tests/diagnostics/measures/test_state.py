import errno
import gzip
import json
import os
import random
import resource

import pytest
import torch

from pre_kernels.diagnostics import LayerReport
from pre_kernels.diagnostics.measures import state
from verify import ROOT

from .support import GRID, assert_rows_equal, data, logits, report


def test_a_loaded_report_continues_as_the_saved_one(tmp_path):
    images = data(40)
    # The samples hold fewer items than there are, so that their draws have to continue too.
    options = {"tokens": 64, "labelled": 16}
    whole = report(images, **options)
    first = report(images[:23], **options)
    first.save(tmp_path / "state", done=23, classes=["a", "b"])
    second, more = LayerReport.load(tmp_path / "state")
    assert more == {"done": 23, "classes": ["a", "b"]}
    for image in images[23:]:
        second.update(**image, grid=GRID, logits=logits)
    assert_rows_equal(second.rows(), whole.rows())
    assert first.rows() == report(images[:23], **options).rows()  # and saving changed nothing
    images = [report_._labelled.items() for report_ in (second, whole)]
    assert [label for label, _ in images[0]] == [label for label, _ in images[1]]


def test_an_empty_report_can_be_saved(tmp_path):
    LayerReport().save(tmp_path / "state")
    found, _ = LayerReport.load(tmp_path / "state")
    found.update(**data(1)[0])
    assert found.images == 1


def test_values_come_back_as_they_were(tmp_path):
    generator = random.Random(3)
    generator.random()
    base = torch.arange(12.0).view(3, 4)
    value = {
        1: (True, None, 1.5, "é"),
        "two": [base.T, base[1], torch.zeros(0)],
        "random": generator,
    }
    state.save(tmp_path / "state", value, ())
    loaded = state.load(tmp_path / "state", ())
    assert loaded[1] == value[1]
    assert all(torch.equal(a, b) for a, b in zip(loaded["two"], value["two"], strict=True))
    assert loaded["random"].random() == generator.random()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_file_has_the_mode_of_any_new_file(tmp_path, umask):
    # A run that was killed may have left a part with another mode.
    (tmp_path / "state.partial").touch(0o600)
    before = os.umask(umask)
    try:
        state.save(tmp_path / "state", {"a": torch.ones(3)}, ())
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o666 & ~umask


class Other:
    pass


def test_only_what_was_named_is_written_or_made(tmp_path):
    with pytest.raises(TypeError, match="got a Other in it"):
        state.save(tmp_path / "state", Other(), ())
    assert not list(tmp_path.iterdir())
    state.save(tmp_path / "state", Other(), (Other,))
    with pytest.raises(ValueError, match="state: cannot be read"):
        state.load(tmp_path / "state", ())


def test_bad_files(tmp_path, monkeypatch):
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match="state: there is no such file"):
        LayerReport.load(path)
    report(data(2)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="state: cannot be read, so the run cannot resume"):
        LayerReport.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="state: cannot be read"):
        LayerReport.load(path)
    for version, says in ((0, "an older version of pre-kernels"), (9, "a newer version")):
        monkeypatch.setattr(state, "VERSION", version)
        report(data(2)).save(path)
        monkeypatch.undo()
        with pytest.raises(ValueError, match=f"{path}: .* has version {version}, want 1; {says}"):
            LayerReport.load(path)


def formula(image):
    """Arguments for `update`, by a formula that no version of torch changes."""

    def wave(rows, columns, step):
        numbers = torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns)
        return torch.sin(numbers * step + image).float()

    anchor = wave(6, 4, 0.37)
    masks = torch.tensor([[True, True, False, False, False, True], [False, False, True] * 2])
    masks[0, 5] = False
    hidden = {0: anchor, 1: wave(6, 3, 0.71)}
    return {
        "hidden": hidden,
        "anchor": anchor,
        "masks": masks,
        "grid": (2, 3),
        "label": image % 2,
    }


# Folders that a version wrote, with four images in the report and rows.json of two more. They are
# never rewritten: a state that an earlier version wrote is read, or refused as what it is.
KEPT = sorted((ROOT / "tests" / "data").glob("report-*"))


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_reports_of_earlier_versions_continue(folder, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(gzip.decompress((folder / "report.safetensors.gz").read_bytes()))
    report, more = LayerReport.load(path)
    assert more == {"done": 4, "classes": ["a", "b"]}
    assert report.images == 4
    for image in (4, 5):
        report.update(**formula(image))
    wanted = json.loads((folder / "rows.json").read_text())
    assert len(wanted) == 2
    # A later version may have more columns.
    found = [{k: row[k] for k in kept} for row, kept in zip(report.rows(), wanted, strict=True)]
    assert_rows_equal(found, wanted)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state"
    report(data(2)).save(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        report(data(3)).save(path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path):
    path = tmp_path / "state"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            report(data(3)).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    assert [*tmp_path.iterdir()] == []
