"""`pre-kernels diagnose`: run images through each model, measure its layers, write the report. An
interrupted run can be resumed."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

import pre_kernels
from pre_kernels.integrations import Reader

from .. import METRICS, LayerReport, similarity_map
from ..report import page
from .data import Images, MaskSource, find_images, names, open_image, open_masks
from .loading import SPREAD, Loaded, check_sources, load
from .measure import Sample, measure
from .samples import PROMPT, Preparation, Unusable, ahead, counted, none_left

# The folder for the result of each model and the state of an interrupted run.
PARTS = "parts"
# The suffix of a file while it is being written.
PARTIAL = ".partial"
# Pixels along the longer side of an image in the report.
THUMBNAIL = 336
# The share of the time that may be spent on saving the state of a run.
SAVING = 0.05
FILES = {
    "diagnosis.json": "all numbers",
    "layers.csv": "a line for each layer",
    "report.html": "the report",
}


@dataclass(frozen=True)
class Settings:
    """The arguments of `pre-kernels diagnose`, with the same defaults."""

    models: tuple[str, ...]
    images: Path
    masks: Path | None = None
    labels: Path | None = None
    background: tuple[int, ...] = (0, 255)
    layers: tuple[int, ...] | None = None
    metrics: tuple[str, ...] = METRICS
    lens: bool = True
    limit: int | None = None
    maps: int = 3
    prompt: str = PROMPT
    dtype: str = "auto"
    device: str = "cpu"
    seed: int = 0
    trust_remote_code: bool = False


def diagnose(
    settings: Settings, out: Path, console: Console | None = None, command: str = ""
) -> dict[str, Any]:
    """Measure every model on every image, and write `FILES` into `out`. Returns the content of
    diagnosis.json.

    The result of each model, and the state of an interrupted run, are kept in out/parts. Their name
    depends on everything that the result depends on: the settings, the files of the model and the
    images. A run with the same name resumes from that state. If it was stopped while an image was
    being added, it resumes from the last save, half a minute or more before.

    Raises:
        ValueError: the message names the argument, what it got and what it needs. It comes before
            any work if possible.
        OSError: `out` cannot be written.
    """
    console = Console(highlight=False, soft_wrap=True) if console is None else console
    images = find_images(settings.images, settings.labels, settings.limit, settings.seed)
    masks = None if settings.masks is None else open_masks(settings.masks, settings.background)
    check_sources(settings.models)
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    results = []
    for source, name in zip(settings.models, names(settings.models), strict=True):
        part = Part.of(settings, source, images, out / PARTS)
        result = part.result()
        if result is None:
            result = examine(settings, source, name, images, masks, part, console)
        else:
            console.print(f"{name}: measured before ({part.path.name})")
        results.append(result | {"name": name})
    document = described(settings, images, results, command)
    texts = (
        json.dumps(document, indent=1) + "\n",
        page.csv_text(document),
        page.html(document),
    )
    for name, text in zip(FILES, texts, strict=True):
        write(out / name, text)
    return document


@dataclass(frozen=True)
class Part:
    """The files of one model: its result at `path` and, while it is being measured, its state at
    `state`."""

    path: Path

    @classmethod
    def of(cls, settings: Settings, source: str, images: Images, folder: Path) -> Part:
        """The part whose name depends on everything that the result depends on."""
        settled = {
            name: str(value)
            for name, value in dataclasses.asdict(settings).items()
            if name != "models"
        }
        files = sorted(Path(source).rglob("*")) if Path(source).is_dir() else []
        files += [item.path for item in images.items]
        files += [path for path in (settings.masks, settings.labels) if path is not None]
        if settings.masks is not None and settings.masks.is_dir():
            files += sorted(settings.masks.rglob("*"))
        parts = folder.resolve()
        stamps = [
            (str(file), stat.st_size, stat.st_mtime_ns)
            for file in files
            if (stat := file.stat()) and file.is_file() and not written(file.resolve(), parts)
        ]
        key = json.dumps([settled, source, stamps, pre_kernels.__version__, torch.__version__])
        return cls(
            folder / f"{Path(source).name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        )

    @property
    def state(self) -> Path:
        return self.path.with_suffix(".safetensors")

    def result(self) -> dict[str, Any] | None:
        """The result, or None if there is none yet. ValueError if the file is broken."""
        if not self.path.exists():
            return None
        try:
            result: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"out: {self.path} is broken: {error}; delete it to measure again"
            ) from error
        return result

    def keep(self, result: dict[str, Any]) -> None:
        write(self.path, json.dumps(result) + "\n")
        self.state.unlink(missing_ok=True)


def examine(
    settings: Settings,
    source: str,
    name: str,
    images: Images,
    masks: MaskSource | None,
    part: Part,
    console: Console,
) -> dict[str, Any]:
    """Measure one model. Returns its rows, heat maps and notes, and keeps them in `part`."""
    if part.state.exists():
        layers, more = LayerReport.load(part.state, sums_device(settings.device))
        console.print(f"{name}: resuming after {more['done']} of {len(images.items)} images")
    else:
        layers = LayerReport(settings.metrics, seed=settings.seed)
        more = {"done": 0, "masked": 0, "left_out": [], "maps": [], "seconds": 0.0}
    console.print(f"{name}: loading")
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    loaded = load(source, dtype, settings.device, settings.trust_remote_code)
    saver = Saver(lambda: layers.save(part.state, **more))
    try:
        with Reader(loaded.model, settings.layers) as reader, progress(console) as bar:
            depth = reader.depth
            task = bar.add_task(name, total=len(images.items), completed=more["done"])
            for sample, item in usable(loaded, images, masks, settings, more, console):
                try:
                    (hidden,) = measure(
                        reader, [sample], layers, lens=settings.lens, device=loaded.model.device
                    )
                except ValueError as error:
                    raise ValueError(f"{name}, {item.name}: {error}") from error
                if len(more["maps"]) < settings.maps and sample.grid is not None:
                    more["maps"].append(heat_map(item.path, item.name, sample, hidden))
                more["masked"] += sample.masks is not None
                more["done"] += 1
                bar.update(task, completed=more["done"])
                saver.now_and_then()
    finally:
        # If the run stopped while an image was being added, some layers have it and others do not.
        # A save now would count it twice on resuming, so the last save is kept.
        if more["done"] and more["done"] == layers.images + len(more["left_out"]):
            more["seconds"] += saver.elapsed()
            saver.save()
    if masks is not None and not more["masked"]:
        console.print(f"masks: {settings.masks} has none of these images", style="yellow")
    if not layers.images:
        raise ValueError(none_left(images, more["left_out"]))
    result = {"depth": depth, "rows": layers.rows(), "device": device_name(settings.device), **more}
    part.keep(result)
    return result


def usable(
    loaded: Loaded,
    images: Images,
    masks: MaskSource | None,
    settings: Settings,
    more: dict[str, Any],
    console: Console,
) -> Iterator[tuple[Sample, Any]]:
    """The usable images that are left, as samples. Unusable images are named and counted."""
    prepare = Preparation(loaded.model, loaded.processor, masks, settings.prompt)
    for item, sample in ahead(prepare, images.items[more["done"] :]):
        if isinstance(sample, Unusable):
            console.print(f"left out: {sample}", style="yellow")
            more["left_out"].append((item.name, sample.reason))
            more["done"] += 1
        else:
            yield sample, item


def heat_map(path: Path, name: str, sample: Sample, hidden: dict[int, Tensor]) -> dict[str, Any]:
    """The similarity of one patch with all patches of its image, at five layers. The patch is one
    of the largest object, or the middle one without masks.

    The result has the form of "maps" in a document for `page.html`, without the name of the model.
    """
    assert sample.grid is not None
    rows, columns = sample.grid
    patch = rows // 2 * columns + columns // 2
    if sample.masks is not None and sample.masks.any():
        members = sample.masks[sample.masks.sum(1).argmax()].nonzero()[:, 0]
        patch = int(members[len(members) // 2])
    numbers = sorted(hidden)
    chosen = sorted({numbers[round(i * (len(numbers) - 1) / 4)] for i in range(5)})
    with io.BytesIO() as buffer:
        picture = open_image(path)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(buffer, "PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode()
    return {
        "image": name,
        "picture": encoded,
        "grid": [rows, columns],
        "patch": [patch // columns, patch % columns],
        "layers": chosen,
        "similarity": [
            [round(v, 4) for v in similarity_map(hidden[n], patch).tolist()] for n in chosen
        ],
    }


def described(
    settings: Settings, images: Images, results: list[dict[str, Any]], command: str
) -> dict[str, Any]:
    """The document that `page.html` shows."""
    labelled = sum(item.label is not None for item in images.items)
    maps: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        for drawn in result["maps"]:
            # Models may cut an image differently. Only maps with the same grid, patch and layers
            # are drawn together.
            key = (drawn["image"], *drawn["grid"], *drawn["patch"], *drawn["layers"])
            joined = maps.setdefault(key, drawn | {"similarity": {}})
            joined["similarity"][result["name"]] = drawn["similarity"]
    models = []
    for result in results:
        notes = counted(result["left_out"])
        if settings.masks is not None and not result["masked"]:
            notes.append(f"{settings.masks} has no mask of any of these images")
        notes += sorted({row["notes"] for row in result["rows"] if row["notes"]})
        models.append(
            {
                "name": result["name"],
                "depth": result["depth"],
                "runs": [result["rows"]],
                "notes": notes,
            }
        )
    masked = max(result["masked"] for result in results)
    return {
        "title": "Visual tokens, layer by layer: "
        + ", ".join(result["name"] for result in results),
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": ", ".join(dict.fromkeys(result["device"] for result in results)),
        "seconds": {result["name"]: round(result["seconds"], 1) for result in results},
        "versions": versions(),
        "data": {
            "images": len(images.items),
            "labelled": labelled,
            "classes": list(images.classes),
            "masks": None if settings.masks is None else f"{settings.masks} (of {masked} images)",
            "folder": str(images.folder),
            "prompt": settings.prompt,
        },
        "models": models,
        "maps": list(maps.values()),
    }


class Saver:
    """Saves now and then, so rarely that saving takes at most the share `SAVING` of the time."""

    def __init__(self, save: Callable[[], None]) -> None:
        self.save = save
        self._start = time.monotonic()
        self._due = self._start + 30.0

    def elapsed(self) -> float:
        """Seconds since this was created."""
        return time.monotonic() - self._start

    def now_and_then(self) -> None:
        begin = time.monotonic()
        if begin < self._due:
            return
        self.save()
        end = time.monotonic()
        self._due = end + max(30.0, (end - begin) / SAVING)


def progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


def sums_device(device: str) -> str:
    """The device of sums that were saved. If layers are on several GPUs, all their sums are on the
    first one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == SPREAD else device


def device_name(device: str) -> str:
    if not sums_device(device).startswith("cuda"):
        return f"CPU, {torch.get_num_threads()} threads"
    count = torch.cuda.device_count() if device == SPREAD else 1
    return (
        f"{count} × {torch.cuda.get_device_name()}"
        if count > 1
        else torch.cuda.get_device_name(sums_device(device))
    )


def versions() -> dict[str, str]:
    import transformers

    return {
        "pre-kernels": pre_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def written(file: Path, parts: Path) -> bool:
    """Whether a run with this folder of parts wrote the file. Both paths are resolved. It matters
    because --out may lie in the folder of the model."""
    return parts in file.parents or (
        file.parent == parts.parent and file.name.removesuffix(PARTIAL) in FILES
    )


def write(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
