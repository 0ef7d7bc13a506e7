"""Sweeps on a GPU: the loss over N and the predictor's width, and the tiles of the Triton matmuls.

python -m bench.tile_sweep sizes --n 9216        ours, eager and the floor at N = 9,216 for
                                                 m = d/4, 2048, d (d = 4096)
python -m bench.tile_sweep tiles --role project  each candidate tile beside cuBLAS, in one of the
                                                 roles of the matmuls
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from pre_kernels import screen
from pre_kernels.check.device import Cpu, Cuda, current
from pre_kernels.check.timing import interleaved, spread
from pre_kernels.loss import unavailable

from . import kept, record, shapes, suite, tables, where

NS = (256, 2304, 4608, 9216, 18432, 24576, 131072)
# how operands are loaded
KINDS = ("descriptor", "pointer")
ROLES = ("project", "backproject", "weight_grad")
# row tiles in a group, tried with the tile that is in use
GROUPS = (4, 16)

Records = Iterator[dict[str, Any]]


def sizes(device: Cpu | Cuda, n: int, dtype: str, d: int = 4096) -> Records:
    """Yield records of the loss at N of 1.25 N rows, for three widths of the predictor."""
    for m in dict.fromkeys((d, 2048 if d == 4096 else d // 2, d // 4)):
        shape = shapes.Shape(f"n{n}-m{m}", 1, n * 5 // 4, n, d, m, d, "sweep")
        names = ("ours-blas", "ours-triton", "ours-torch", "eager", "floor")
        for line in suite.measure(
            shape, dtype, device, names, 2.0, with_memory=device.kind == "cuda"
        ):
            yield line | {"kind": "sweep"}


def tiles(
    device: Cpu | Cuda,
    role: str,
    n: int,
    d: int,
    m: int,
    dtype: str,
    kinds: Sequence[str] = KINDS,
    most: int | None = None,
) -> Records:
    """Yield milliseconds of a matmul for each candidate (of each kind the `most` likely ones) and
    for cuBLAS, which take turns. Only correct results count."""
    if reason := unavailable(device.torch_device, shapes.DTYPES[dtype]):
        yield {"kind": "tile", "role": role, "item": role, "unavailable": reason}
        return
    from pre_kernels.fused.kernels import tiles
    from pre_kernels.fused.kernels.common import arch
    from pre_kernels.fused.kernels.tune import CANDIDATES

    tables = {"descriptor": tiles.DESCRIPTOR_TILES, "pointer": tiles.POINTER_TILES}
    for kind in kinds:
        table = tables[kind]
        if kind == "descriptor" and any(
            width * shapes.DTYPES[dtype].itemsize % 16 for width in (d, m)
        ):
            reason = (
                f"rows of {d} and {m} elements: not multiples of 16 bytes, which descriptors need"
            )
            yield {"kind": "tile", "role": role, "item": f"{role} {kind}", "unavailable": reason}
            continue
        run, blas, result, truth = _product(device, role, n, d, m, shapes.DTYPES[dtype])
        key = arch(result), shapes.DTYPES[dtype].itemsize
        if key not in table:
            continue
        in_use = tiles.choose(table[key], *result.shape, result)
        plan = [(tile, tiles.GROUP_M) for tile in CANDIDATES[kind] if device.kind == "cuda"]
        plan = [
            (in_use, tiles.GROUP_M),
            *(p for p in plan if p[0] != in_use),
            *((in_use, g) for g in GROUPS),
        ]
        for tile, group_m in plan[:most]:
            about = {
                "kind": "tile",
                "role": role,
                "n": n,
                "d": d,
                "m": m,
                "kernel": kind,
                "group_m": group_m,
            }
            about |= {"item": f"{role} {kind} {tuple(tile)} group {group_m}", "tile": list(tile)}
            about |= {"in_use": tile == in_use and group_m == tiles.GROUP_M, "flop": 2 * n * d * m}
            with (
                mock.patch.dict(tiles.DESCRIPTOR_TILES, clear=True),
                mock.patch.dict(table, {key: (tile,)}),
                # Without this a tuned tile would be timed under each name.
                mock.patch.object(tiles, "remembered", dict),
                mock.patch.object(tiles, "GROUP_M", group_m),
            ):
                result.fill_(0.0 if role == "weight_grad" else torch.nan)
                about |= _timed(
                    device, run, blas, result, truth, about["flop"], shapes.DTYPES[dtype]
                )
            yield about


def _timed(
    device: Cpu | Cuda,
    run: Callable[[], Any],
    blas: Callable[[], Any],
    result: torch.Tensor,
    truth: torch.Tensor,
    flop: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the metrics of a matmul, or why there are none."""
    try:
        run()
        device.synchronize()
        error = ((result.double() - truth).norm() / truth.norm()).item()
        if not error < 2 * torch.finfo(dtype).eps:
            return {"failed": f"relative error {error:.2e}"}
        metrics: dict[str, Any] = {"error": error}
        if device.kind == "cuda":  # the interpreter is never timed
            times = interleaved(device, {"tile": run, "blas": blas}, 0.2)
            metrics |= spread(times["tile"])
            metrics["blas_ms"] = spread(times["blas"])["median_ms"]
            metrics["over_blas"] = metrics["median_ms"] / metrics["blas_ms"]
            metrics["tflops"] = flop / metrics["median_ms"] / 1e9
        return metrics
    except Exception as error:  # too much shared memory, say: the next candidate may fit
        return {"unavailable": suite.reason(error)}


def _product(
    device: Cpu | Cuda, role: str, n: int, d: int, m: int, dtype: torch.dtype
) -> tuple[Callable[[], Any], Callable[[], Any], torch.Tensor, torch.Tensor]:
    """Return (ours, cuBLAS's, ours' output, the float64 result) of a matmul in one of its roles."""
    from pre_kernels.fused.kernels.matmul import matmul
    from pre_kernels.fused.kernels.weight_grad import add_weight_grad

    torch_device = device.torch_device
    generator = torch.Generator(torch_device).manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=torch_device)

    x = randn(n, d)
    dy = randn(n, m)
    w = randn(m, d) / d**0.5
    bias = randn(m)
    if role == "project":
        y, out = randn(n, m), randn(n, m)
        truth = x.double() @ w.double().t() + bias.double()
        return lambda: matmul(x, w.t(), y, bias=bias), lambda: torch.mm(x, w.t(), out=out), y, truth
    if role == "backproject":
        y, out = randn(n, d), randn(n, d)
        return (
            lambda: matmul(dy, w, y),
            lambda: torch.mm(dy, w, out=out),
            y,
            dy.double() @ w.double(),
        )
    total = torch.zeros(m, d, device=torch_device)
    out = torch.empty_like(w)
    truth = dy.double().t() @ x.double()
    return lambda: add_weight_grad(total, dy, x), lambda: torch.mm(dy.t(), x, out=out), total, truth


def main(argv: Sequence[str] | None = None) -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("what", choices=("sizes", "tiles"))
    add("--n", type=int, default=9216, help=f"rows; the sweep takes {NS}")
    add("--d", type=int, default=4096)
    add("--m", type=int, default=4096, help="dtype of a tile's matmul")
    add("--role", choices=ROLES, default="project")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of loads")
    add("--most", type=int, help="number of candidates of each kind (default: all)")
    add("--dtype", choices=shapes.DTYPES, default="bf16")
    where.add_options(add)
    arguments = parser.parse_args(argv)

    device = current()
    run = kept.start(arguments, device, parser.error)
    stamp = record.stamp(device) | {"dtype": arguments.dtype}
    if arguments.what == "sizes":
        records = sizes(device, arguments.n, arguments.dtype, arguments.d)
    else:
        size = arguments.n, arguments.d, arguments.m, arguments.dtype
        records = tiles(device, arguments.role, *size, arguments.kinds, arguments.most)
    run.every(line | stamp for line in records)
    lines = run.records
    table = (
        tables.loss_table(record.latest(lines))
        if arguments.what == "sizes"
        else tables.plain_table(lines)
    )
    print(tables.markdown(table), *run.told(), sep="\n")
    return run.status or int(any("failed" in line for line in lines))


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
