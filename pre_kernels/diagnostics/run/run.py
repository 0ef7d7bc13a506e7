"""`pre-kernels diagnose`: run images through each model, measure its layers, write the report. An
interrupted run can be resumed."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import pre_kernels
from pre_kernels.integrations import Reader
from pre_kernels.screen import plural, why, write

from .. import LayerReport, similarity_map
from ..report import page, terminal
from .data import Images, MaskSource, find_images, names, open_image, open_masks
from .left_out import MASKS, Tally, by_reason, counted, images_of, none_left
from .loading import SPREAD, Loaded, check_sources, load
from .measure import Sample, measure
from .parts import FILES as FILES
from .parts import PARTS, Part, Saver, alone, strangers
from .progress import Meter, quiet_loading
from .samples import Preparation, ahead
from .settings import Settings as Settings

# Pixels along the longer side of an image in the report.
THUMBNAIL = 336


def diagnose(
    settings: Settings, out: Path, console: Console | None = None, command: str = ""
) -> dict[str, Any]:
    """Measure every model on every image, and write `FILES` into `out`. Returns the content of
    diagnosis.json.

    The result of each model, and the state of an interrupted run, are kept in out/parts. Their name
    depends on everything that the result depends on: the settings, the files of the model and the
    images. A run with the same name resumes from that state. If it was stopped while an image was
    being added, it resumes from the last save, half a minute or more before.

    If the disk does not take what is to be kept, a line says so and measuring continues. If it does
    not take the files, what was found is printed.

    Raises:
        ValueError: the message names the argument, what it got and what it needs. It comes before
            any work if possible.
        OSError: a file of `out` cannot be written. It names the file.
        KeyboardInterrupt: with a line about what is kept.
    """
    console = Console(highlight=False, soft_wrap=True) if console is None else console
    images = find_images(settings.images, settings.labels, settings.limit, settings.seed)
    masks = None if settings.masks is None else open_masks(settings.masks, settings.background)
    check_sources(settings.models)
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    with alone(out):
        parts = [Part.of(settings, source, images, out / PARTS) for source in settings.models]
        if line := strangers(out / PARTS, parts):
            console.print(line)
        results = Run(settings, images, masks, console).results(parts)
        document = described(settings, images, results, command)
        console.print("writing the report")
        try:
            write_all(document, out)
        except OSError:
            terminal.show(document, console)
            raise
        except KeyboardInterrupt as stop:
            stop.args = ("all is measured and kept; the same command writes the report",)
            raise
    return document


def write_all(document: dict[str, Any], out: Path) -> None:
    """Write `FILES`, the report last, as drawing it takes some seconds."""
    contents: tuple[Callable[[], str], ...] = (
        lambda: json.dumps(document, indent=1) + "\n",
        lambda: page.csv_text(document),
        lambda: page.html(document),
    )
    for name, content in zip(FILES, contents, strict=True):
        write(out / name, content())


class Run:
    """The measuring of the models of a run."""

    def __init__(
        self, settings: Settings, images: Images, masks: MaskSource | None, console: Console
    ) -> None:
        self.settings = settings
        self.images = images
        self.masks = masks
        self.console = console

    def results(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """The result of each model, measured or read from its part."""
        number = len(self.images.items)
        models = [*zip(names(self.settings.models), self.settings.models, parts, strict=True)]
        self.meter = Meter(
            self.console, {name: number for name, _, part in models if not part.path.exists()}
        )
        results = []
        for name, source, part in models:
            result = part.result()
            if result is None:
                result = self.examine(source, name, part)
            else:
                self.console.print(f"{name}: measured before ({part.path.name})")
            results.append(result | {"name": name})
        return results

    def examine(self, source: str, name: str, part: Part) -> dict[str, Any]:
        """Measure one model. Returns its rows, heat maps and what was left out, and keeps them in
        `part`."""
        settings = self.settings
        total = len(self.images.items)
        layers = LayerReport(settings.metrics, seed=settings.seed)
        more = {"done": 0, "masked": 0, "left_out": [], "maps": [], "seconds": 0.0}
        if part.state.exists():
            layers, more = LayerReport.load(part.state, sums_device(settings.device))
            self.console.print(f"{name}: resuming after {more['done']} of {total} images")
        kept = more["done"]

        def save() -> None:
            nonlocal kept
            layers.save(part.state, **more)
            kept = more["done"]

        try:
            self.console.print(f"{name}: loading the model")
            dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
            with quiet_loading():
                loaded = load(source, dtype, settings.device, settings.trust_remote_code)
            depth, number = self.add_images(name, loaded, layers, more, Saver(save, self.warn))
            rows = []
            with self.meter.stage(name, "layers", number) as step:
                for row in layers.iter_rows():
                    rows.append(row)
                    step()
        except KeyboardInterrupt as stop:
            what = f"{kept} of {total} images of {name} are" if kept else f"nothing of {name} is"
            stop.args = (f"{what} kept; the same command resumes",)
            raise
        result = {"depth": depth, "rows": rows, "device": device_name(settings.device), **more}
        try:
            part.keep(result)
        except OSError as error:
            self.warn(why(error))
        return result

    def add_images(
        self, name: str, loaded: Loaded, layers: LayerReport, more: dict[str, Any], saver: Saver
    ) -> tuple[int, int]:
        """Add the images that are left to `layers`, and save. Returns the depth of the model and
        the number of layers measured."""
        settings = self.settings
        total = len(self.images.items)
        tally = Tally(more["left_out"], lambda text: self.warn(f"left out: {text}"))
        prepare = Preparation(loaded.model, loaded.processor, self.masks, settings.prompt)
        device = loaded.model.device
        try:
            with (
                Reader(loaded.model, settings.layers) as reader,
                self.meter.stage(name, "images", total, more["done"]) as step,
            ):
                for item, sample, without in ahead(
                    prepare.usable, self.images.items[more["done"] :]
                ):
                    if without is not None:
                        tally.add(item.name, without)
                    if sample is not None:
                        try:
                            (hidden,) = measure(
                                reader, [sample], layers, lens=settings.lens, device=device
                            )
                        except ValueError as error:
                            raise ValueError(f"{name}, {item.name}: {error}") from error
                        if len(more["maps"]) < settings.maps and sample.grid is not None:
                            more["maps"].append(heat_map(item.path, item.name, sample, hidden))
                        more["masked"] += sample.masks is not None
                    more["done"] += 1
                    step()
                    saver.now_and_then()
                depth = reader.depth
                number = len(reader.layers)
        finally:
            # If the run stopped while an image was being added, some layers have it and others do
            # not. A save now would count it twice on resuming, so the last save is kept.
            if more["done"] and more["done"] == layers.images + len(images_of(more["left_out"])):
                more["seconds"] += saver.elapsed()
                saver.save()
        tally.close()
        if line := no_masks(settings, more):
            self.warn(f"masks: {line}")
        if not layers.images:
            raise ValueError(none_left(self.images.folder, total, more["left_out"]))
        return depth, number

    def warn(self, text: str) -> None:
        """Print a line that stands out."""
        self.console.print(text, style="yellow")


def no_masks(settings: Settings, more: Mapping[str, Any]) -> str | None:
    """Why no image has a mask, or None if one has."""
    if settings.masks is None or more["masked"]:
        return None
    number = sum(reason in MASKS for _, reason in more["left_out"])
    if number:
        return f"none of the {number} masks in {settings.masks} can be used"
    return f"{settings.masks} has no mask of any of these images"


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
    left_out = [tuple(one) for result in results for one in result["left_out"]]
    without = images_of(left_out)
    used = [item for item in images.items if item.name not in without]
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
        if line := no_masks(settings, result):
            notes.append(line)
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
        + " and ".join(f"“{result['name']}”" for result in results),
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": ", ".join(dict.fromkeys(result["device"] for result in results)),
        "seconds": {result["name"]: round(result["seconds"], 1) for result in results},
        "versions": versions(),
        "data": {
            # An image that one model cannot use is not counted.
            "images": len(used),
            "listed": len(images.items),
            "left_out": by_reason(left_out),
            "labelled": sum(item.label is not None for item in used),
            "classes": list(images.classes),
            "masks": None if settings.masks is None else f"{settings.masks} (of {masked} images)",
            "folder": str(images.folder),
            "prompt": settings.prompt,
        },
        "models": models,
        "maps": list(maps.values()),
    }


def sums_device(device: str) -> str:
    """The device of sums that were saved. If layers are on several GPUs, all their sums are on the
    first one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == SPREAD else device


def device_name(device: str) -> str:
    if not sums_device(device).startswith("cuda"):
        return f"CPU, {plural(torch.get_num_threads(), 'thread')}"
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
