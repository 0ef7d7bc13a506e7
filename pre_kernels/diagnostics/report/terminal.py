"""A report on a terminal: the verdict in words, and the main measures in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from .columns import PROBES, Column, by_layer, main_columns
from .verdict import Document, Model, about, probe_part, verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show(document: Document, console: Console) -> None:
    """Print the warning, what the report is about, `table`, and the verdict. The verdict comes
    last, so that it is still on the screen when the command has ended. Lines break at spaces.

    Needs rich.

    Args:
        document: as for `page.html`.
        console: of any width. Lines fit 60 columns.
    """
    from rich.text import Text

    if warning := document.get("warning"):
        console.print(Text(warning, "bold yellow"), soft_wrap=False)
    if text := about(document):
        console.print(Text(text, "dim"), soft_wrap=False)
        console.print()
    console.print(table(document), soft_wrap=False)
    console.print()
    said = document.get("verdict")
    for text in verdict(document) if said is None else said:
        line = Text(text)
        line.stylize("bold", 0, text.find(": ") + 1)
        console.print(line, soft_wrap=False)


def table(document: Document) -> Table:
    """The main measures of each model at the first layer measured, at the lowest value and at the
    last layer: means over runs."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    shown.add_column("", overflow="fold")
    for name in ("first layer", "lowest (layer)", "last layer"):
        shown.add_column(name, justify="right")
    for column in main_columns(document["models"]):
        shown.add_row(Text(f"{column.title}{column.arrow}{_tested(document, column)}"))
        for model in document["models"]:
            shown.add_row(Text(f"  {model['name']}"), *_cells(model, column))
    return shown


def _cells(model: Model, column: Column) -> Iterator[str]:
    values = by_layer(model["runs"], column.name)
    if not values:
        yield from ("–", "–", "–")
        return
    means: Mapping[int, Any] = {layer: mean(found) for layer, found in values.items()}
    digits = min(column.digits, 2)
    least = min(means, key=lambda layer: means[layer])
    yield f"{means[min(means)]:.{digits}f}"
    yield f"{means[least]:.{digits}f} {f'({least})':>4}"
    yield f"{means[max(means)]:.{digits}f}"


def _tested(document: Document, column: Column) -> str:
    """The size of the probes' test part, in brackets."""
    parts = [part for model in document["models"] if (part := probe_part(model))]
    if column.name not in PROBES or not parts:
        return ""
    return f" ({min(parts).size:,} test {document.get('unit') or 'images'})"
