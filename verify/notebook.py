"""Run a notebook and keep its outputs: `python -m verify.notebook examples/quickstart.ipynb`.

What depends on the machine or the moment is left out: counts of executions, times, warnings and
other lines of stderr, and the versions of Python and its kernel.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

# the most bytes that all outputs of a notebook may have
MOST = 200_000


def executed(path: Path, replaced: dict[int, str] | None = None, timeout: int = 600) -> Any:
    """The notebook with the outputs of a run in its folder.

    Args:
        path: of the notebook, which is left as it is.
        replaced: the source to run in the place of a cell's, by the number of the cell.
        timeout: the most seconds that a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: where a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    for number, source in (replaced or {}).items():
        notebook.cells[number].source = source
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": path.parent}},
    ).execute()
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """The same without what depends on the machine or the moment."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.metadata.pop("execution", None)
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.outputs:
            output.pop("execution_count", None)
            if "data" in output and "image/png" in output["data"]:
                output["data"].pop("text/plain", None)
        # What a cell's last expression is, where it draws: `<matplotlib.legend.Legend at 0x…>`.
        cell.outputs = [o for o in cell.outputs if o.output_type != "execute_result"]
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", type=Path)
    path = parser.parse_args().notebook
    notebook = executed(path)
    nbformat.validate(notebook)
    size = sum(len(str(cell.get("outputs", ""))) for cell in notebook.cells)
    if size > MOST:
        raise SystemExit(f"notebook: got outputs of {size:,} bytes, want at most {MOST:,}")
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
