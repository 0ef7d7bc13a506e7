"""The pictures of docs/diagnostics.md: each measure over depth, from a diagnosis of the demo's
models.

    python -m bench.measure_plots                           the demo's models, into docs/pictures
    python -m bench.measure_plots DIR/diagnosis.json build  other models, into build

The input is the diagnosis.json that `pre-kernels diagnose` writes; that of the demo's models is
bench/results/diagnosis.json. `PICTURES` says which measures share a picture. A measure without
values is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pre_kernels.demo.settings import Settings
from pre_kernels.diagnostics.report import plots
from pre_kernels.diagnostics.report.columns import COLUMNS, Column, by_layer

from . import ROOT, record, where

# Spatial contrast compares these two similarities. The report shows only their ratio.
NEIGHBOURS = tuple(
    Column(name, title, "mean cosine", formula, "the grid of the patches")
    for name, title, formula in (
        ("near", "Near", "mean cosine similarity of patches that share a side"),
        ("far", "Far", "mean cosine similarity of distant patches"),
    )
)
PICTURES: dict[str, tuple[Column, ...]] = {
    "probes": (COLUMNS["linear_probe"], COLUMNS["knn_probe"]),
    "contrast": (COLUMNS["contrast"], COLUMNS["cohesion"], COLUMNS["coupling"]),
    "spatial": (COLUMNS["spatial_contrast"], *NEIGHBOURS),
    "dimension": (COLUMNS["effective_dimension"], COLUMNS["components_90"]),
    "correlation": (COLUMNS["correlation"],),
    "norms": (COLUMNS["norm_mean"], COLUMNS["massive_tokens"]),
    "likeness": (COLUMNS["cosine"], COLUMNS["cka_debiased"], COLUMNS["cknna"]),
    "lens": (COLUMNS["lens_share"],),
}
MAPS = "maps"
DPI = 90


def draw(document: Mapping[str, Any], folder: Path, marked: Sequence[int] = ()) -> list[Path]:
    """Write measure_*.png into `folder`; returns the files.

    Args:
        document: as diagnosis.json has it.
        folder: is made if it is missing.
        marked: layers that get a grey vertical line, where PRe reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = document["models"]
    figures = {}
    for name, columns in PICTURES.items():
        measured = [
            column
            for column in columns
            if any(by_layer(model["runs"], column.name) for model in models)
        ]
        if measured:
            figures[name] = plots.depth(models, measured, marked)
    if document.get("maps"):
        figures[MAPS] = plots.heat_maps(document["maps"][0])
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"measure_{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def named(document: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A copy of `document` in which models have other names."""
    models = [model | {"name": names[model["name"]]} for model in document["models"]]
    maps = [
        heat_map | {"similarity": {names[key]: v for key, v in heat_map["similarity"].items()}}
        for heat_map in document["maps"]
    ]
    return {**document, "models": models, "maps": maps}


def main(argv: Sequence[str] | None = None) -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add(
        "diagnosis",
        type=Path,
        nargs="?",
        metavar="JSON",
        help="what pre-kernels diagnose wrote (default: the committed one of the demo's models)",
    )
    add(
        "folder",
        type=Path,
        nargs="?",
        default=ROOT / "docs" / "pictures",
        metavar="DIR",
        help="for the pictures (default: docs/pictures)",
    )
    arguments = parser.parse_args(argv)
    source = arguments.diagnosis or record.RESULTS / "diagnosis.json"
    document = json.loads(source.read_text(encoding="utf-8"))
    marked: list[int] = []
    if arguments.diagnosis is None:
        # diagnosis.json names the models by their folders, and does not say where PRe reads.
        document = named(document, {"without": "without PRe", "with": "with PRe"})
        marked = [Settings().pre_layer]
    for path in draw(document, arguments.folder, marked):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
