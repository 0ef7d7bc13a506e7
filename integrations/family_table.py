"""The table of supported families, made from `families.FAMILIES`, for `pre-kernels env --models`
and for docs/models.md."""

from __future__ import annotations

from dataclasses import dataclass

from .families import FAMILIES, GENERIC, ORIGINAL, Family

HEAD = (
    "family",
    "config.model_type",
    "transformers",
    "images told apart by",
    'anchor="pre_projector"',
    "video tokens",
)
# How the rule `images` of a family tells images apart, in plain words. A rule that is not listed
# here is shown by its function's name.
RULES = {
    "runs": "runs of visual tokens",
    "equal_parts": "equal parts",
    "runs_or_parts": "runs, videos: equal parts",
    "patches": "image_sizes, else equal parts",
    "grids": "grid_thw",
    "tiles": "tiles of pixel_values",
    "shapes": "spatial_shapes",
    # the merge of the original code bases, see llava.Merge
    "merge": "their order in images",
}


@dataclass(frozen=True)
class Support:
    """One line of the table: the model types of a family whose settings are the same. `types` is
    empty if the config does not identify the family."""

    name: str
    types: tuple[str, ...]
    row: Family

    def cells(self) -> tuple[str, ...]:
        """The cells in the order of HEAD; they do not depend on the installed version."""
        original = self.row is ORIGINAL
        rule = "merge" if original else self.row.images.__name__
        projector = "yes" if self.row.projector else "pass a callable"
        if original:
            projector = "yes, but for newline rows"
        return (
            self.name,
            ", ".join(self.types),
            f"≥ {self.row.since}" if self.types else "",
            RULES.get(rule, rule.replace("_", " ")),
            projector,
            "yes" if self.row.videos or self.row is GENERIC else "",
        )


def supported() -> list[Support]:
    """The lines of the table: FAMILIES in their order, the original code bases, and models that are
    not listed."""
    types: dict[tuple[str, Family], list[str]] = {}
    for model_type, row in FAMILIES.items():
        types.setdefault((row.name or model_type, row), []).append(model_type)
    lines = [Support(name, tuple(of), row) for (name, row), of in types.items()]
    return [
        *lines,
        Support(ORIGINAL.name, (), ORIGINAL),
        Support("any other whose parts are found", (), GENERIC),
    ]


def text(installed: str | None) -> str:
    """The table in aligned columns. The last one says whether the `installed` version of
    transformers has the family."""
    table: list[tuple[str, ...]] = [(*HEAD, "here")]
    table += [(*line.cells(), _here(line, installed)) for line in supported()]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def markdown() -> str:
    """The table of docs/models.md, which does not depend on what is installed."""
    lines = [
        "| "
        + " | ".join(f"`{cell}`" if "=" in cell or "." in cell else cell for cell in HEAD)
        + " |"
    ]
    lines.append("|" + "---|" * len(HEAD))
    for line in supported():
        cells = list(line.cells())
        cells[1] = ", ".join(f"`{model_type}`" for model_type in line.types)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _here(line: Support, installed: str | None) -> str:
    if installed is None:
        return "no transformers"
    if not line.types:
        return ""
    return "yes" if _version(line.row.since) <= _version(installed) else "no"


def _version(text: str) -> tuple[int, ...]:
    """5.24.0.dev0 → (5, 24)."""
    return tuple(int(part) for part in text.split(".")[:2])
