"""Whole waves: how a call is split into chunks, and how often the multiprocessors take turns for a
chunk's matmuls."""

import random
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import shapes
from pre_kernels.fused.kernels import tiles
from pre_kernels.fused.ops import steps_of
from pre_kernels.fused.sweep import Selection, equal_parts, sweep
from pre_kernels.problem import DIFFERENTIABLE, Options, Problem
from verify.fences import KERNEL

TILE = tiles.Tile(128, 256, 64, 8, 4)

# For bfloat16 rows on 132 multiprocessors: the chunks, the turns of 128 × 256 tiles in the four
# matmuls of rows with a weight, and how many turns there would be if tiles could be shared out.
WAVES = {
    ("llava15-7b-sft", "index", None): (1, 36, 34.9),
    ("llava15-7b-sft", "mask", None): (1, 64, 62.1),
    ("qwen25vl-7b", "index", None): (1, 20, 17.0),
    ("qwen25vl-7b-small", "index", None): (1, 4, 0.8),
    ("llava15-7b-pretrain", "index", None): (2, 72, 69.8),
    ("llava15-7b-pretrain", "mask", None): (2, 80, 77.6),
    ("llava-next-qwen2-7b", "index", None): (1, 52, 48.4),
    ("llava-next-qwen2-7b", "mask", None): (2, 68, 67.9),
    ("qwen25vl-3b", "index", None): (1, 12, 9.7),
    ("qwen25vl-72b", "index", None): (1, 40, 38.8),
    ("qwen25vl-72b", "mask", None): (1, 64, 62.1),
    ("qwen3vl-8b", "index", None): (1, 36, 34.9),
    ("qwen3vl-32b", "index", None): (1, 44, 43.6),
    ("qwen3vl-4b", "index", None): (1, 24, 21.8),
    ("internvl3-8b", "index", None): (1, 48, 44.1),
    ("llava15-7b-clip", "index", None): (1, 30, 28.4),
    ("qwen25vl-7b-video", "index", None): (2, 84, 81.5),
    ("llava15-7b-sft", "index", 256): (2, 36, 34.9),
    ("llava15-7b-sft", "index", 64): (9, 36, 34.9),
    ("llava15-7b-clip", "index", 64): (5, 32, 28.4),
    ("qwen25vl-3b", "index", 64): (3, 12, 9.7),
}


def turns(spans, columns, multiprocessors=132):
    """Count the turns of 128 × 256 tiles independently of the library."""
    return sum(
        -(-(-(-n // 128) * -(-width // 256)) // multiprocessors) for n in spans for width in columns
    )


def nothing(*args, **kwargs):
    pass


def problem_of(shape, rows, workspace, device="meta"):
    """Return a bfloat16 problem and its selected rows. A mask differs from an index only in the
    capacity."""

    def empty(*size, dtype=torch.bfloat16):
        return torch.empty(size, dtype=dtype, device=device)

    d, m, z = shape.d, shape.m, shape.z
    total = shape.rows
    capacity = shape.selected if rows == "index" else shape.rows
    index = empty(capacity, dtype=torch.int64)
    workspace = None if workspace is None else workspace << 20
    options = Options(
        "cosine", "gelu", "mean", torch.bfloat16, *[False] * 3, None, workspace, None, None
    )
    given = {"hidden": empty(total, d), "anchor": empty(total, z), "rows": index}
    given |= {"w1": empty(m, d), "b1": empty(m), "w2": empty(z, m), "b2": empty(z)}
    problem = Problem(**(dict.fromkeys(Problem._fields) | given | {"options": options}))
    return problem, Selection(index, empty(total, dtype=torch.int32), None, capacity)


def products_of(impl, shape, rows, workspace):
    """Return (rows, columns) of the output of each matmul with a weight, without allocating or
    running anything."""
    problem, selection = problem_of(shape, rows, workspace)
    losses = problem.hidden.new_empty(selection.capacity, dtype=torch.float32)
    seen = []

    class Recorded(steps_of(impl)):
        def _linear(self, x, weight, bias, out):
            seen.append(tuple(out.shape))

    with mock.patch.object(KERNEL, "run", nothing):
        wanted = [x is not None for x in problem[:DIFFERENTIABLE]]
        sweep(Recorded, problem, selection, wanted, losses, Recorded.divisor(problem, selection))
    return seen


@pytest.mark.parametrize("impl", ["blas", "triton"])
@pytest.mark.parametrize("case", WAVES, ids=lambda case: " ".join(map(str, case)))
def test_turns_of_real_shapes(impl, case):
    name, rows, workspace = case
    shape = shapes.BY_NAME[name]
    chunks, wanted, ideal = WAVES[case]
    found = products_of(impl, shape, rows, workspace)
    assert len(found) == 4 * chunks
    assert sum(turns([n], [width]) for n, width in found) == wanted
    area = sum(n * width for n, width in found)
    assert area == (shape.selected if rows == "index" else shape.rows) * (
        2 * shape.m + shape.z + shape.d
    )
    assert area / (128 * 256 * 132) == pytest.approx(ideal, abs=0.05)


def test_every_real_shape_is_in_the_table():
    assert {(shape.name, "index", None) for shape in shapes.GPU} <= WAVES.keys()


@pytest.mark.parametrize("multiprocessors", [1, 108, 114, 132, 148])
def test_never_worse_than_equal_parts(multiprocessors):
    pick = random.Random(multiprocessors)
    better = 0
    for _ in range(1000):
        columns = tuple(
            pick.choice([64, 768, 1280, 2048, 3584, 4096, 8192, 65536, pick.randrange(1, 9000)])
            for _ in "mzmd"
        )
        most = 128 * pick.randrange(1, 400)
        rows = pick.randrange(most + 1, 12 * most)
        part = equal_parts(rows, most, 128)
        chunk = tiles.whole_turns(rows, most, part, columns, TILE, multiprocessors)
        assert chunk % 128 == 0
        assert 0 < chunk <= most
        ours, theirs = (
            [min(size, rows - start) for start in range(0, rows, size)] for size in (chunk, part)
        )
        assert turns(ours, columns, multiprocessors) <= turns(theirs, columns, multiprocessors)
        better += turns(ours, columns, multiprocessors) < turns(theirs, columns, multiprocessors)
    assert better > 50 or multiprocessors == 1


@pytest.mark.parametrize("impl", ["blas", "triton"])
@pytest.mark.parametrize("workspace", [1, 16])
def test_a_workspace_too_small_for_a_turn(impl, workspace):
    """As many rows as fit are taken, in full tiles, and at least 128."""
    shape = shapes.BY_NAME["qwen25vl-72b"]
    found = products_of(impl, shape, "index", workspace)
    sizes = [n for n, _ in found[::4]]
    assert sum(sizes) == shape.selected
    assert set(sizes[:-1]) == {128}


@pytest.mark.parametrize(
    ("rows", "most", "part"),
    [(300, 128, 128), (9216, 4608, 4608), (9216, 1664, 1536), (65, 64, 64)],
)
def test_equal_parts(rows, most, part):
    assert equal_parts(rows, most, 64 if most == 64 else 128) == part


@pytest.mark.parametrize("impl", ["blas", "triton"])
def test_the_layout_asks_no_device(impl):
    """The shapes of a GPU's fake tensors are enough, on machines without a GPU too."""
    with FakeTensorMode():
        problem = problem_of(shapes.BY_NAME["llava15-7b-pretrain"], "index", None, "cuda")[0]
        assert problem.hidden.is_cuda
        assert steps_of(impl).layout(problem).rows == 17024
