"""Which part of a product a program computes: the shapes of tiles, the choice among them, their
order and their epilogue."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import arch as arch
from .common import cdiv


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int
    blocks: int = 1  # how many persistent programs share a multiprocessor


# The shipped tiles have as keys the architecture and the bytes of an element (2 is float16 and
# bfloat16). `choose` takes the tile of a row that fills the device best, and the first where
# several do. The first is also `largest`, which sets how chunks are split. A block has 227 KiB of
# shared memory on sm90 and sm100, 163 KiB on sm80 (99 KiB on consumer cards), and 64 KiB on gfx942.
# IEEE float32 does not use tensor cores, and its operands need the registers that larger
# accumulators would take.
POINTER_TILES = {
    ("sm100", 2): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
    ("sm100", 4): (Tile(128, 128, 16, 8, 3), Tile(64, 64, 16, 4, 3)),
    ("sm90", 2): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
    ("sm90", 4): (Tile(128, 128, 16, 8, 3), Tile(64, 64, 16, 4, 3)),
    ("sm80", 2): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    ("sm80", 4): (Tile(128, 128, 16, 8, 3), Tile(64, 64, 16, 4, 3)),
    ("gfx", 2): (Tile(128, 128, 32, 4, 2), Tile(64, 64, 32, 4, 2)),
    ("gfx", 4): (Tile(128, 128, 16, 8, 2), Tile(64, 64, 16, 4, 2)),
}
# If rows do not start at multiples of 16 elements, loads are one element wide and pass through
# registers.
UNALIGNED = Tile(64, 64, 16, 4, 2)
# Loads by tensor descriptor (TMA) bypass registers, so one more pipeline stage fits in shared
# memory beside the 32 KiB of the epilogue.
DESCRIPTOR_TILES = {
    ("sm100", 2): (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 6)),
    ("sm90", 2): (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 6)),
}
# This many row tiles in turn share a column tile of the weight while it is in the L2 cache.
GROUP_M = 8


@lru_cache
def _multiprocessors(index: int | None) -> int:
    if index is None:
        return 132
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(tensor: Tensor) -> int:
    """Return how many multiprocessors the tensor's device has; outside a GPU, those of an H200."""
    return _multiprocessors(tensor.device.index if tensor.is_cuda else None)


def cache_file() -> Path:
    """Return the file in which `pre-kernels tune` saves its results, in $PRE_KERNELS_CACHE or else
    in ~/.cache/pre_kernels."""
    folder = os.environ.get("PRE_KERNELS_CACHE") or Path.home() / ".cache" / "pre_kernels"
    return Path(folder) / "tiles.json"


@lru_cache
def remembered() -> dict[str, Tile]:
    """Return the tuned tiles by `key`, or none if the file is missing or cannot be read."""
    path: Path | str = "tiles.json"
    try:
        path = cache_file()  # This raises where there is no home folder.
        return {key: Tile(*map(int, tile)) for key, tile in json.loads(path.read_text()).items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is ignored, because it cannot be read as tuned tiles: {error}; "
            "PRE_KERNELS_CACHE may name another folder",
            stacklevel=2,
        )
        return {}


def rows_class(rows: int) -> str:
    """Return a coarse class for the rows of an output: N is ragged, and a kernel should not be
    compiled anew for each."""
    return "few" if rows <= 512 else "some" if rows <= 4096 else "many"


@lru_cache
def _device_name(index: int | None) -> str:
    return "interpreter" if index is None else torch.cuda.get_device_name(index)


def key(kind: str, role: str, rows: int, columns: int, operand: Tensor) -> str:
    """Return the name of a tuned tile in the file. kind: "descriptor" | "pointer". role: "rows" for
    a chunk by a weight | "weight" for its gradient. rows, columns: the size of the output."""
    device = _device_name(operand.device.index if operand.is_cuda else None)
    size = operand.element_size()
    return (
        f"{device}, triton {triton.__version__}: {role} by {kind}, {size} bytes, "
        f"{columns} columns, {rows_class(rows)} rows"
    )


def table(kind: str, tensor: Tensor, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Return the shipped tiles of the tensor's architecture."""
    tables = DESCRIPTOR_TILES if kind == "descriptor" else POINTER_TILES
    return tables[arch(tensor), dtype.itemsize]


def has_descriptors(tensor: Tensor, dtype: torch.dtype) -> bool:
    return (arch(tensor), dtype.itemsize) in DESCRIPTOR_TILES


def best(kind: str, role: str, rows: int, columns: int, operand: Tensor) -> Tile:
    """Return the tuned tile if there is one, else the shipped one that fills the device best."""
    if known := remembered():
        tuned = known.get(key(kind, role, rows, columns, operand))
        if tuned is not None:
            return tuned
    return choose(table(kind, operand, operand.dtype), rows, columns, operand)


def choose(candidates: tuple[Tile, ...], rows: int, columns: int, tensor: Tensor) -> Tile:
    """Return the candidate that is expected to be the fastest for this many rows and columns of
    output."""
    return _fastest(candidates, rows, columns, multiprocessors(tensor))


@lru_cache(4096)  # N is ragged, so there are many keys.
def _fastest(candidates: tuple[Tile, ...], rows: int, columns: int, multiprocessors: int) -> Tile:
    """Return the candidate of the lowest cost: turns of a multiprocessor times the cost of a tile.

    The cost of a tile is its matmul work m · n plus 64 times its operand loads m + n. The factor 64
    is fitted so that a tile of 128 × 128 reaches 7/8 of the rate of one of 128 × 256.
    """

    def cost(tile: Tile) -> int:
        tiles = cdiv(rows, tile.m) * cdiv(columns, tile.n)
        turns = cdiv(tiles, multiprocessors * tile.blocks) * tile.blocks
        return turns * (tile.m * tile.n + 64 * (tile.m + tile.n))

    return min(candidates, key=cost)


def largest(tensor: Tensor, dtype: torch.dtype) -> Tile:
    """Return the shipped tile for matmuls of many rows in `dtype`. The vendor's tiles are about as
    large."""
    return table("descriptor" if has_descriptors(tensor, dtype) else "pointer", tensor, dtype)[0]


# Another chunk costs this many turns: it adds its part of the weights' gradients to sums in
# float32, and ten launches begin and end.
CHUNK_TURNS = 2


@lru_cache
def whole_turns(
    rows: int, most: int, part: int, columns: tuple[int, ...], tile: Tile, multiprocessors: int
) -> int:
    """Return how many of `rows` rows a chunk should have: at most `most`. The last chunk takes the
    rest.

    The multiprocessors take turns at the tiles of a matmul. The cost counts the turns of all
    matmuls of the rows, whose outputs have this many `columns`. The candidates are `part`, and the
    numbers of rows whose tiles fill whole turns in the widest matmul.
    """
    across = [cdiv(width, tile.n) for width in columns]

    def turns(chunk: int) -> int:
        down = cdiv(chunk, tile.m)
        return sum(cdiv(down * wide, multiprocessors) for wide in across)

    def cost(chunk: int) -> int:
        whole, rest = divmod(rows, chunk)
        return whole * turns(chunk) + turns(rest) + CHUNK_TURNS * cdiv(rows, chunk)

    widest = max(across)
    most_turns = most // tile.m * widest // multiprocessors
    filling = dict.fromkeys(
        multiprocessors * turn // widest * tile.m for turn in range(most_turns, 0, -1)
    )
    return min([*filter(None, filling), part], key=cost)


def pointer_tile(x: Tensor, w: Tensor, role: str, rows: int, columns: int) -> Tile:
    """Return the tile for a matmul of `x` with `w`, in w's dtype, with loads through pointers."""
    aligned = all(stride == 1 or stride % 16 == 0 for stride in (*x.stride(), *w.stride()))
    return best("pointer", role, rows, columns, w) if aligned else UNALIGNED


def descriptor_tile(
    x: Tensor, w: Tensor, others: Sequence[Tensor | None], role: str, rows: int, columns: int
) -> Tile | None:
    """Return the tile for the same matmul with loads through tensor descriptors, or None where they
    are not possible: on other architectures, in float32, with a cast, and where rows are not
    contiguous, overlap, or are not aligned to 16 bytes."""
    if not has_descriptors(x, w.dtype) or x.dtype != w.dtype:
        return None
    for tensor in (x, w, *others):
        if tensor is not None:
            stride, column_stride = tensor.stride()
            overlapping = stride < tensor.shape[1]  # Expanded rows overlap.
            if (
                column_stride != 1
                or overlapping
                or stride * tensor.element_size() % 16
                or tensor.data_ptr() % 16
            ):
                return None
    return best("descriptor", role, rows, columns, w)


def constants(tile: Tile) -> dict[str, int]:
    """Return the constants of its tile that every matmul kernel takes."""
    blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": GROUP_M}
    return {**blocks, "num_warps": tile.warps, "num_stages": tile.stages}


def programs(tile: Tile, rows: int, columns: int, tensor: Tensor) -> int:
    """Return how many persistent programs share the tiles of an output."""
    tiles = cdiv(rows, tile.m) * cdiv(columns, tile.n)
    return min(tiles, multiprocessors(tensor) * tile.blocks)


def describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe the tensor in blocks of (rows, columns). The host does this, so that kernels do not
    need scratch memory."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the tile coordinates of a program, going down groups of GROUP_M row tiles."""
    group = GROUP_M * tiles_n
    first_m = pid // group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + pid % group % rows, pid % group // rows


@triton.jit
def halves(b_y):
    """Return the left and the right half of a tile."""
    M: tl.constexpr = b_y.shape[0]
    HALF: tl.constexpr = b_y.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(b_y, (M, 2, HALF)), (0, 2, 1)))


@triton.jit
def quarters(b_y):
    """Return the four parts of a tile, from left to right."""
    b_left, b_right = halves(b_y)
    b_0, b_1 = halves(b_left)
    b_2, b_3 = halves(b_right)
    return b_0, b_1, b_2, b_3
