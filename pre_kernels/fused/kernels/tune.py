"""Opt-in tuning: the candidate tiles of each product timed on this device, the best kept in a file
for later calls."""

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

ROWS = (256, 2048, 9216)  # one of each class of `tiles.rows_class`

# The likeliest first; what does not fit the device's shared memory is passed over.
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
    """The tuning of one role and size: milliseconds of each tile that ran, the shipped one first,
    and its key in the file."""

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
    """Time the candidates for square weights of each width, a result as it comes; the best is kept
    at once."""
    for width in widths:
        for n in ROWS:
            x, y, w = (torch.randn(rows, width, device=device).to(dtype) for rows in (n, n, width))
            total = torch.empty_like(w)

            def rows(tile: Tile, x: Tensor = x, y: Tensor = y, w: Tensor = w) -> None:
                matmul(x, w.t(), y, tile=tile)
                matmul(x, w, y, tile=tile)  # both layouts share a key

            def weight(tile: Tile, x: Tensor = x, y: Tensor = y, total: Tensor = total) -> None:
                add_weight_grad(total, y, x, first=True, tile=tile)

            roles: list[tuple[str, Callable[[Tile], None], Tensor]] = [("rows", rows, y)]
            if n == ROWS[-1]:  # the number of rows is no size of its output
                roles.append(("weight", weight, total))
            kind = "descriptor" if tiles.has_descriptors(w, dtype) else "pointer"
            for role, run, out in roles:
                size = out.shape[0], out.shape[1]
                shipped = tiles.choose(tiles.table(kind, w, dtype), *size, w)
                times = {}
                for tile in dict.fromkeys((shipped, *CANDIDATES[kind])):
                    try:
                        times[tile] = time(partial(run, tile))
                    except Exception:  # too much shared memory, or registers
                        continue
                if times:
                    name = f"{role}, n = {n}, width {width}"
                    tuned = Tuned(name, times, tiles.key(kind, role, *size, w))
                    remember(tuned.key, tuned.best)
                    yield tuned


def remember(key: str, tile: Tile) -> None:
    """Add to the file, or replace in it; a reader never sees half of it."""
    path = tiles.cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    tiles.remembered.cache_clear()  # another process may have added to it
    known = {name: list(kept) for name, kept in tiles.remembered().items()} | {key: list(tile)}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=1))
    temporary.replace(path)
    tiles.remembered.cache_clear()
