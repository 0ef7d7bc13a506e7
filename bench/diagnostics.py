"""The cost of the diagnostics of patch structure: sums of unit vectors, compared with all pairwise
similarities and with the definition per pair.

    python -m bench.diagnostics      64 images × 576 patches × 32 layers, 4,096 wide
    python -m bench.diagnostics --images 2 --patches 64 --layers 2 --width 256

One image of one layer is timed: contrast ratio and spatial contrast of random float32 features with
8 objects. Images and layers are independent of each other, so the total is that time × images ×
layers. It is extrapolated, as each record says. A method whose four means differ from those of all
similarities in float64 gets no time.

`ours` is `LayerReport`, checks included. `matrix` computes the patch-by-patch similarities in one
float32 matmul and averages over them. `pairs` is the definition as a loop over pairs of patches.
The first two take turns; the loop runs once and its memory is not measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pre_kernels import screen
from pre_kernels.check import memory as resident
from pre_kernels.check.device import MIB, Cpu, Cuda, current
from pre_kernels.check.timing import interleaved, spread
from pre_kernels.diagnostics import LayerReport

from . import ROOT, kept, record, tables, where

OBJECTS = 8
# the error that means of cosines may have with float32 matmuls
TOLERANCE = 1e-5

Means = tuple[float, float, float, float]
Step = Callable[[], Means]


def case(patches: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return features (patches, width) with a common part, as features of models have it, masks
    (OBJECTS, patches), and the grid."""
    rows = max(side for side in range(1, math.isqrt(patches) + 1) if patches % side == 0)
    g = torch.Generator().manual_seed(0)
    features = torch.randn(patches, width, generator=g) + 0.5 * torch.randn(width, generator=g)
    member = torch.arange(patches) * OBJECTS // patches
    masks = member == torch.arange(OBJECTS)[:, None]
    return features.to(device), masks.to(device), (rows, patches // rows)


def ours(features: Tensor, masks: Tensor, grid: tuple[int, int]) -> Means:
    layers = LayerReport(metrics=("structure",))
    layers.update({0: features}, features, masks=masks, grid=grid)
    (row,) = layers.rows()
    return row["cohesion"], row["coupling"], row["near"], row["far"]


def matrix(features: Tensor, masks: Tensor, grid: tuple[int, int]) -> Means:
    x = F.normalize(features, dim=-1)
    similarity = x @ x.T
    member = masks.to(similarity.dtype)
    pairs = member @ similarity @ member.T
    size = member.sum(1)
    within = (pairs.diagonal() - member @ similarity.diagonal()) / (size * (size - 1))
    between = (pairs / (size[:, None] * size))[torch.ones_like(pairs).triu(1).bool()]
    near, far = relations(len(features), grid, features.device)
    means = (within.mean(), between.mean(), similarity[near].mean(), similarity[far].mean())
    cohesion, coupling, close, distant = torch.stack(means).tolist()
    return cohesion, coupling, close, distant


def relations(patches: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two bool (patches, patches): which patches share a side, and which are further apart
    than the radius."""
    number = torch.arange(patches, device=device)
    rows, columns = number // grid[1], number % grid[1]
    down = (rows[:, None] - rows).abs()
    along = (columns[:, None] - columns).abs()
    return down + along == 1, torch.maximum(down, along) > max(1, min(grid) // 4)


def pairs(features: Tensor, masks: Tensor, grid: tuple[int, int]) -> Means:
    near, far = (
        relation.tolist() for relation in relations(len(features), grid, torch.device("cpu"))
    )
    member = masks.int().argmax(0).tolist()
    within: dict[int, list[float]] = {}
    between: dict[tuple[int, int], list[float]] = {}
    close: list[float] = []
    distant: list[float] = []
    for i in range(len(features)):
        for j in range(i):
            similarity = F.cosine_similarity(features[i], features[j], dim=0).item()
            a, b = member[j], member[i]
            if a == b:
                within.setdefault(a, []).append(similarity)
            else:
                between.setdefault((a, b), []).append(similarity)
            if near[i][j]:
                close.append(similarity)
            if far[i][j]:
                distant.append(similarity)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return (
        mean([mean(values) for values in within.values()]),
        mean([mean(values) for values in between.values()]),
        mean(close),
        mean(distant),
    )


NAMES = {
    "ours": "`LayerReport`",
    "matrix": "all similarities of an image at once",
    "pairs": "the definition, per pair",
}
METHODS = {"ours": ours, "matrix": matrix, "pairs": pairs}


def steps(patches: int, width: int, device: torch.device) -> dict[str, Step]:
    features, masks, grid = case(patches, width, device)

    def bound(function: Callable[..., Means]) -> Step:
        return lambda: function(features, masks, grid)

    return {name: bound(function) for name, function in METHODS.items()}


def measure(
    images: int, patches: int, layers: int, width: int, device: Cpu | Cuda, seconds: float = 5.0
) -> Iterator[dict[str, Any]]:
    """Yield a record of each method."""
    by_name = steps(patches, width, device.torch_device)
    features, masks, grid = case(patches, width, device.torch_device)
    expected = torch.tensor(matrix(features.double(), masks, grid))
    stamp = record.stamp(device)
    shape = f"{images}x{patches}x{layers}x{width}"
    about = {
        "kind": "diagnostics",
        "item": "patch structure",
        "shape": shape,
        "images": images,
        "patches": patches,
        "layers": layers,
        "width": width,
        "dtype": "fp32",
        "group": f"{stamp['date']} diagnostics {shape}",
    }
    means: dict[str, tuple[float, ...]] = {}

    def kept(name: str) -> Callable[[], None]:
        return lambda: means.update({name: by_name[name]()})

    samples = interleaved(device, {name: kept(name) for name in ("ours", "matrix")}, seconds)
    samples["pairs"] = [device.sample(kept("pairs"))]
    times = {name: spread(samples[name]) for name in METHODS}

    for name in METHODS:
        off = (torch.tensor(means[name]) - expected).abs().max().item()
        if not off <= TOLERANCE:
            failed = f"a mean is off by {off:.1e}, want ≤ {TOLERANCE}"
            yield {**about, "peer": name, "failed": failed, **stamp}
            continue
        result = {
            **times[name],
            "extrapolated_from": "1 image of 1 layer",
            "total_s": times[name]["median_ms"] * images * layers / 1e3,
            "slower_than_ours": times[name]["median_ms"] / times["ours"]["median_ms"],
            "largest_error": off,
            # memory of all similarities of all images and layers together
            "all_pairs_mib": images * layers * patches**2 * 4 / MIB,
            **({} if name == "pairs" else peak(name, patches, width, device, by_name[name])),
        }
        yield {**about, "peer": name, **result, **stamp}


def page(records: Sequence[dict[str, Any]]) -> str:
    """Return the page's table of what patch structure of a data set costs, and where its numbers
    come from."""
    chosen = [entry for entry in records if entry["kind"] == "diagnostics" and "median_ms" in entry]
    if not chosen:
        return "Not yet measured."
    last = max(chosen, key=lambda entry: entry["date"])
    chosen = [entry for entry in chosen if entry["group"] == last["group"]]
    rows: list[Sequence[str]] = [
        (
            "patch structure of",
            "by",
            "ms for an image's layer",
            "all of it, s",
            "÷ ours",
            "peak MiB",
            "largest error",
        )
    ]
    for entry in chosen:
        what = (
            f"{entry['images']} images × {entry['patches']} patches × {entry['layers']} layers × "
            f"{entry['width']:,} wide"
        )
        memory = f"{entry['peak_mib']:,.0f}" if "peak_mib" in entry else ""
        rows.append(
            (
                what,
                NAMES[entry["peer"]],
                f"{entry['median_ms']:,.1f}",
                f"{entry['total_s']:,.0f}",
                f"{entry['slower_than_ours']:,.1f}",
                memory,
                f"{entry['largest_error']:.0e}",
            )
        )
    kept = sorted({f"{entry['all_pairs_mib']:,.0f} MiB" for entry in chosen})
    about = (
        "Both the contrast ratio and the spatial contrast. One image of one layer is timed and the "
        "rest extrapolated, since images and layers are independent. All pairwise similarities "
        f"together would take {', '.join(kept)}."
    )
    return "\n".join([tables.markdown(rows), "", about, "", tables.below(chosen)])


def peak(name: str, patches: int, width: int, device: Cpu | Cuda, step: Step) -> dict[str, Any]:
    """Return the memory beyond the features of one image and layer, at the peak of a step."""
    if isinstance(device, Cuda):
        return {"peak_mib": device.peak(lambda: step()[:0])[0]}
    if reason := resident.missing():
        return {"memory_unavailable": reason}
    arguments = ("--patches", str(patches), "--width", str(width), "--peak", name)
    return resident.fresh("bench.diagnostics", *arguments, folder=ROOT)


def main(argv: Sequence[str] | None = None) -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    for name, default in (("images", 64), ("patches", 576), ("layers", 32), ("width", 4096)):
        add(f"--{name}", type=int, default=default)
    add("--seconds", type=float, default=5.0, help="seconds of sampling")
    where.add_options(add)
    # A process that measures memory runs with this option.
    add("--peak", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak:
        step = steps(arguments.patches, arguments.width, torch.device("cpu"))[arguments.peak]
        print(json.dumps({"peak_mib": resident.second(step)[0]}))
        return 0

    device = current()
    run = kept.start(arguments, device, parser.error)
    run.every(
        measure(
            arguments.images,
            arguments.patches,
            arguments.layers,
            arguments.width,
            device,
            arguments.seconds,
        )
    )
    table = tables.markdown(tables.plain_table(run.records)) if run.records else ""
    print(table, *tables.refusals(run.records), *run.told(), sep="\n")
    return run.status or int(any("failed" in line for line in run.records))


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
