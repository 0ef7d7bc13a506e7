"""The sweep of tiles, on a machine where it cannot run."""

from bench import tile_sweep
from pre_kernels.check.device import Cpu


def test_tiles_that_cannot_be_tried(monkeypatch):
    tiles = {"device": Cpu(), "role": "project", "n": 80, "d": 60, "m": 96, "dtype": "bf16"}
    (line,) = tile_sweep.tiles(**tiles, kinds=["descriptor"])
    assert (
        line["unavailable"]
        == "rows of 60 and 96 elements: not multiples of 16 bytes, which descriptors need"
    )
    monkeypatch.setattr(tile_sweep, "unavailable", lambda device, dtype: "triton is not installed")
    (line,) = tile_sweep.tiles(**tiles)
    assert line["unavailable"] == "triton is not installed"
