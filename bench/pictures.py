"""The pictures of docs/pictures that are drawn from results.

Each keeps a digest of what it was drawn from, so a test can tell when it is older than its results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from . import ROOT, demo_plots, pages, plots
from .pages import DEMO, REAL, Records
from .tables import outdated

FOLDER = ROOT / "docs" / "pictures"
# the name of the text in a PNG that holds the digest
DRAWN_FROM = "Drawn from"


def real(name: str, *more: str) -> Callable[[Any, Path, str], object]:
    """Return a function of `real_plots`, for which transformers is loaded only when it draws.

    Args:
        more: its further arguments.
    """

    def draw(found: Any, path: Path, note: str) -> None:
        from . import real_plots

        getattr(real_plots, name)(found, path, note, *more)

    return draw


class Picture(NamedTuple):
    # Draws results into a file, with a line of text below.
    draw: Callable[[Any, Path, str], object]
    # the kinds of its records
    kinds: tuple[str, ...] = ()
    # or the demo whose committed run it shows
    run: str = ""


PICTURES = {
    "speed.png": Picture(plots.bars, ("loss",)),
    "workspace.png": Picture(plots.workspaces, ("workspace",)),
    "demo.png": Picture(demo_plots.demo, run=DEMO),
    "probe.png": Picture(demo_plots.probe, run=DEMO),
    "pre_loss.png": Picture(demo_plots.pre_loss, run=DEMO),
    "real.png": Picture(real("depth"), (REAL,)),
    "real_probe.png": Picture(real("probe"), (REAL,)),
    "real_training_probe.png": Picture(real("training", "identity"), run=REAL),
    "real_training_contrast.png": Picture(real("training", "contrast"), run=REAL),
}


def results(name: str, records: Records) -> Any:
    """Return what a picture is drawn from: a demo's results, the records of the real LLM that are
    shown, or otherwise the records of the device that was measured last."""
    _, kinds, run = PICTURES[name]
    if run:
        return pages.run_of(run)
    kept = [entry for entry in records if entry["kind"] in kinds]
    if kinds == (REAL,):
        from .real_plots import shown

        return shown(kept)
    last = max(kept, key=lambda entry: entry["date"], default={})
    return [entry for entry in kept if entry["device"] == last["device"]]


def note(name: str, found: Any) -> str:
    """Return the line below a picture."""
    run = PICTURES[name].run
    return outdated([{**found, "kind": run}] if run else found)


def digest(name: str, records: Records) -> str:
    """Return a digest of the results that a picture shows and of the line below it."""
    found = results(name, records)
    text = json.dumps([found, note(name, found)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def drawn_from(path: Path) -> str | None:
    """Return the digest that a picture keeps."""
    from PIL import Image

    with Image.open(path) as image:
        found: str | None = image.info.get(DRAWN_FROM)
    return found


def draw(names: Iterable[str], records: Records, folder: Path = FOLDER) -> None:
    """Draw those of these pictures that are not yet drawn from these results."""
    from PIL import Image, PngImagePlugin

    for name in names:
        path = folder / name
        if path.exists() and drawn_from(path) == digest(name, records):
            continue
        found = results(name, records)
        PICTURES[name].draw(found, path, note(name, found))
        about = PngImagePlugin.PngInfo()
        about.add_text(DRAWN_FROM, digest(name, records))
        with Image.open(path) as image:
            image.save(path, pnginfo=about, optimize=True)
