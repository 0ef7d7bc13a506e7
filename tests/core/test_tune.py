"""Tuned tiles are timed, saved and found again. No test times anything for real."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from pre_kernels import cli
from pre_kernels.fused.kernels import tiles, tune
from pre_kernels.fused.kernels.matmul import matmul
from pre_kernels.fused.kernels.weight_grad import add_weight_grad

SMALL = tiles.Tile(64, 128, 64, 4, 6)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PRE_KERNELS_CACHE", str(tmp_path / "cache"))
    tiles.remembered.cache_clear()
    yield tmp_path / "cache"
    tiles.remembered.cache_clear()


def test_the_best_is_kept_and_used(device, folder, monkeypatch):
    """By this clock one tile is the fastest, and one does not fit."""
    taken = []

    def time(run):
        run()
        tile = taken[-1]
        if tile.stages == 3:
            raise RuntimeError("out of resource: shared memory")
        return 0.5 if tile == SMALL else 1.0

    for name in ("matmul", "add_weight_grad"):
        monkeypatch.setattr(tune, name, lambda *_, tile, **__: taken.append(tile))
    timings = list(tune.tune([256], device=device, time=time))
    assert len(timings) == len(tune.ROWS) + 1
    assert all(timing.best == SMALL for timing in timings)
    assert not any(tile.stages == 3 for timing in timings for tile in timing.times)
    kept = json.loads((folder / "tiles.json").read_text())
    assert set(map(tuple, kept.values())) == {tuple(SMALL)}

    monkeypatch.undo()
    monkeypatch.setenv("PRE_KERNELS_CACHE", str(folder))
    operand = torch.empty(256, 256, dtype=torch.bfloat16, device=device)
    for rows in (1, 200, 512, 5000, 9000, 131072):  # Keys have classes of rows, not N.
        assert tiles.best("descriptor", "rows", rows, 256, operand) == SMALL
    assert tiles.best("descriptor", "rows", 9216, 512, operand) != SMALL
    # The only weight that was timed is 256 × 256.
    assert tiles.best("descriptor", "weight", 9216, 256, operand) != SMALL
    # Keys have the bytes of an element, not the dtype.
    assert tiles.best("descriptor", "rows", 9216, 256, operand.half()) == SMALL
    assert tiles.key("pointer", "rows", 9, 256, operand) != tiles.key(
        "pointer", "rows", 9, 256, operand.float()
    )


def test_a_product_takes_the_tuned_tile(device, monkeypatch):
    x, y = (torch.randn(40, 64, device=device).bfloat16() for _ in range(2))
    w = torch.randn(64, 64, device=device).bfloat16()
    seen = []
    real = tiles.constants
    monkeypatch.setattr(tiles, "constants", lambda tile: seen.append(tile) or real(tile))
    tune.remember(tiles.key("descriptor", "rows", 40, 64, w), SMALL)
    matmul(x, w, y)
    matmul(x, w, y, tile=tiles.Tile(128, 128, 64, 8, 4))
    assert seen == [SMALL, tiles.Tile(128, 128, 64, 8, 4)]
    torch.testing.assert_close(y.float(), x.float() @ w.float(), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_given_tile_is_taken(device, monkeypatch, dtype):
    """Tuning times exactly the tile that it passes, by descriptors and by pointers."""
    x, w = (torch.randn(40, 40, device=device).to(dtype) for _ in range(2))
    seen = []
    real = tiles.constants
    given = tiles.Tile(64, 64, 16, 4, 2, 3)
    monkeypatch.setattr(tiles, "constants", lambda tile: seen.append(tile) or real(tile))
    total = torch.empty(40, 40, device=device)
    matmul(x, w, torch.empty_like(x), tile=given)
    add_weight_grad(total, x, w, first=True, tile=given)
    assert seen == [given, given]
    torch.testing.assert_close(total, x.float().t() @ w.float(), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": ["x"]}', '{"a": [1, 2]}'])
def test_a_corrupt_file_is_named_and_ignored(folder, text):
    folder.mkdir()
    (folder / "tiles.json").write_text(text)
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored"):
        assert tiles.remembered() == {}


def test_what_another_process_kept_meanwhile_stays(folder):
    tune.remember("mine, few rows", SMALL)
    tiles.remembered()  # This process's next matmul does the same.
    kept = json.loads((folder / "tiles.json").read_text())
    (folder / "tiles.json").write_text(json.dumps(kept | {"theirs": list(SMALL)}))
    tune.remember("mine, many rows", SMALL)
    assert set(tiles.remembered()) == {"mine, few rows", "theirs", "mine, many rows"}


def test_no_home_is_no_error(monkeypatch):
    """A user in a container may be one that no passwd entry knows."""
    monkeypatch.delenv("PRE_KERNELS_CACHE")
    monkeypatch.delenv("HOME", raising=False)

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored.*home directory"):
        assert tiles.remembered() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.remembered() == {}  # The warning comes once.


def test_a_folder_that_may_not_be_entered_is_no_error(folder, monkeypatch):
    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("stat", "read_text"):
        monkeypatch.setattr(Path, name, denied)
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored.*Permission denied"):
        assert tiles.remembered() == {}


@pytest.mark.parametrize("where", ["nowhere", os.devnull])
def test_no_file_is_no_warning(folder, monkeypatch, where):
    monkeypatch.setenv("PRE_KERNELS_CACHE", where)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.remembered() == {}


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert "tune needs a GPU, and torch sees none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["tune", "--width", "100"])
    assert "want a multiple of 16" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_sweep_of_tiles_times_the_shipped_tile_and_not_the_tuned_one(monkeypatch, dtype):
    from bench import shapes, tile_sweep
    from pre_kernels.check.device import Cpu

    operand = torch.empty(64, 64, dtype=shapes.DTYPES[dtype])
    for kind in tune.CANDIDATES:
        # This tile is not a candidate.
        tune.remember(tiles.key(kind, "rows", 32, 64, operand), tiles.Tile(32, 32, 32, 4, 2))
    seen = []
    real = tiles.constants
    monkeypatch.setattr(tiles, "constants", lambda tile: seen.append(list(tile)) or real(tile))
    lines = list(tile_sweep.tiles(Cpu(), "project", 32, 64, 64, dtype))
    assert lines
    assert seen == [line["tile"] for line in lines]
