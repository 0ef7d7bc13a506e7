"""Opt-in tuning: time the candidate tiles of each matmul on this device, and save the best in a
file for later calls."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import tiles
from .matmul import matmul
from .tiles import Tile
from .weight_grad import add_weight_grad

ROWS = (256, 2048, 9216)  # Each class of `tiles.rows_class` has one.

# The likeliest candidates come first. A candidate that does not fit the device's shared memory is
# skipped.
CANDIDATES = {
    "descriptor": [
        Tile(128, 256, 64, 8, 4),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 4, 3, 2),
        Tile(256, 128, 64, 8, 4),
        Tile(256, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 128, 8, 3),
        Tile(64, 256, 64, 4, 4),
        Tile(64, 128, 64, 4, 6),
        Tile(64, 128, 64, 4, 4, 2),
    ],
    "pointer": [
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 32, 8, 3),
        Tile(64, 128, 64, 4, 4),
    ],
}


class Tuned(NamedTuple):
    """The tuning of one role and size: the milliseconds of each tile that ran, the shipped one
    first, and the result's key in the file."""

    name: str
    times: dict[Tile, float]
    key: str

    @property
    def best(self) -> Tile:
        return min(self.times, key=lambda tile: self.times[tile])


def tune(
    widths: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    time: Callable[[Callable[[], Any]], float] = triton.testing.do_bench,
) -> Iterator[Tuned]:
    """Time the candidates for square weights of each width. Save each best tile at once, and yield
    each result as it comes."""
    for width in widths:
        for n in ROWS:
            x, y, w = (torch.randn(rows, width, device=device).to(dtype) for rows in (n, n, width))
            total = torch.empty_like(w)

            def rows(tile: Tile, x: Tensor = x, y: Tensor = y, w: Tensor = w) -> None:
                matmul(x, w.t(), y, tile=tile)
                matmul(x, w, y, tile=tile)  # Both layouts share a key.

            def weight(tile: Tile, x: Tensor = x, y: Tensor = y, total: Tensor = total) -> None:
                add_weight_grad(total, y, x, first=True, tile=tile)

            roles: list[tuple[str, Callable[[Tile], None], Tensor]] = [("rows", rows, y)]
            if n == ROWS[-1]:  # The size of this output does not depend on the number of rows.
                roles.append(("weight", weight, total))
            kind = "descriptor" if tiles.has_descriptors(w, dtype) else "pointer"
            for role, run, out in roles:
                size = out.shape[0], out.shape[1]
                shipped = tiles.choose(tiles.table(kind, w, dtype), *size, w)
                times = {}
                for tile in dict.fromkeys((shipped, *CANDIDATES[kind])):
                    try:
                        times[tile] = time(partial(run, tile))
                    except Exception:  # It needs too much shared memory, or too many registers.
                        continue
                if times:
                    name = f"{role}, n = {n}, width {width}"
                    tuned = Tuned(name, times, tiles.key(kind, role, *size, w))
                    remember(tuned.key, tuned.best)
                    yield tuned


def remember(key: str, tile: Tile) -> None:
    """Add a tile to the file, or replace it there. A reader never sees a half-written file."""
    path = tiles.cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    tiles.remembered.cache_clear()  # Another process may have added to the file.
    known = {name: list(kept) for name, kept in tiles.remembered().items()} | {key: list(tile)}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=1))
    temporary.replace(path)
    tiles.remembered.cache_clear()
