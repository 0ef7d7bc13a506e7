"""The images of a report, their classes, the masks of the objects in them, and the names of the
models."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .left_out import Unusable

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
IMAGE_COLUMNS = ("image", "file", "filename", "file_name")
CLASS_COLUMNS = ("label", "class")
# uint8 can number this many objects of an image.
MOST_OBJECTS = 255
INSTALL = "pip install 'pre-kernels[diagnose]'"


@dataclass(frozen=True)
class Item:
    """One image: its path, its name (the path inside the folder, with forward slashes), and the
    index of its class, if known."""

    path: Path
    name: str
    label: int | None


@dataclass(frozen=True)
class Images:
    """The images of a folder. `classes` has the names of the classes in the order of their index.
    It is empty if images have no classes."""

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    folder: Path


def find_images(
    folder: Path, labels: Path | None = None, limit: int | None = None, seed: int = 0
) -> Images:
    """The images in `folder`, in an order that `seed` determines, and their classes.

    Without `labels`, images directly in `folder` have no class. If there are none, each subfolder
    with images directly in it is a class. An image is a file whose name ends in one of
    `EXTENSIONS`, in upper or lower case. Files and subfolders whose names begin with a dot are
    ignored.

    The order is random within each class, and classes take turns. So the first n images are a
    sample that is balanced as far as the sizes of the classes allow. `limit` selects them, and an
    interrupted run has seen such a sample too. A larger `limit` only adds images at the end. The
    order depends only on the set of names and the seed.

    Args:
        folder: the folder of the images.
        labels: a CSV file in UTF-8 with a header. Two columns are read: the path of the image in
            `folder`, with forward slashes, under one of `IMAGE_COLUMNS`, and the name of its class,
            under one of `CLASS_COLUMNS` (both in upper or lower case). It may name images in any
            subfolder. Images that it does not name are left out.
        limit: the largest number of images. None: all images.
        seed: the seed of the order.

    Raises:
        ValueError: the message names the argument, what it got and what it needs. A single class
            without `labels` is not an error, though no probe can be trained on it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "not there"
        raise ValueError(f"images: {folder} is {what}, want a folder")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit: got {limit!r}, want a positive integer")
    named = _by_folder(folder) if labels is None else _by_table(folder, Path(labels))
    classes = tuple(sorted(name for name in named if name is not None))
    if limit is not None and limit < len(classes):
        raise ValueError(
            f"limit: got {limit} for {len(classes)} classes, want at least one image of each"
        )

    draw = random.Random(seed)
    turns: list[tuple[int, int, Item]] = []
    for number, key in enumerate(classes or (None,)):
        names = sorted(named[key])
        draw.shuffle(names)
        label = None if key is None else number
        turns += [
            (turn, number, Item(folder / name, name, label)) for turn, name in enumerate(names)
        ]
    items = [item for *_, item in sorted(turns, key=lambda turn: turn[:2])]
    return Images(tuple(items[:limit]), classes, folder)


def _by_folder(folder: Path) -> dict[str | None, list[str]]:
    """Names of images by class. Images without a class are under None."""
    named: dict[str | None, list[str]] = {}
    for subfolder in sorted(folder.iterdir()):
        if subfolder.is_dir() and not subfolder.name.startswith("."):
            images = [path for path in sorted(subfolder.iterdir()) if _is_image(path)]
            if images:
                named[subfolder.name] = [path.relative_to(folder).as_posix() for path in images]
    direct = [path.name for path in folder.iterdir() if _is_image(path)]
    if direct and named:
        raise ValueError(
            f"images: {folder} has {len(direct)} images beside {len(named)} subfolders with images "
            f"({', '.join(sorted(map(repr, named)))}), want either images or a subfolder for each "
            "class"
        )
    if direct:
        return {None: direct}
    if not named:
        raise ValueError(
            f"images: {folder} has no images, neither directly in it nor in its subfolders, want "
            f"files that end in {', '.join(EXTENSIONS)}"
        )
    return named


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


def _by_table(folder: Path, labels: Path) -> dict[str | None, list[str]]:
    named: dict[str | None, list[str]] = {}
    seen: dict[str, int] = {}
    for line, name, label in _rows(labels):
        where = f"labels: line {line} of {labels}"
        path = PurePosixPath(name)
        if not name or not label:
            raise ValueError(f"{where} has image {name!r} and class {label!r}, want both")
        if path.is_absolute() or ".." in path.parts or not (folder / path).is_file():
            raise ValueError(
                f"{where} names {name!r}, want the path of an image in {folder}, with forward "
                "slashes"
            )
        if (first := seen.setdefault(path.as_posix(), line)) != line:
            raise ValueError(
                f"{where} names {name!r} again, after line {first}, want one row for an image"
            )
        named.setdefault(label, []).append(path.as_posix())
    if len(named) < 2:
        got = ", ".join(map(repr, named)) if named else "no rows"
        raise ValueError(
            f"labels: {labels} has {got}, want images of at least two classes, for a probe to tell "
            "apart"
        )
    return named


def _rows(labels: Path) -> Iterator[tuple[int, str, str]]:
    """The rows of a CSV file as (line number, image, class)."""
    try:
        with labels.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            image, label = (
                _column(labels, header, names) for names in (IMAGE_COLUMNS, CLASS_COLUMNS)
            )
            for row in reader:
                yield reader.line_num, (row[image] or "").strip(), (row[label] or "").strip()
    except (OSError, UnicodeError, csv.Error) as error:
        raise ValueError(
            f"labels: cannot read {labels}, want a CSV file in UTF-8: {error}"
        ) from error


def _column(labels: Path, header: list[str], names: tuple[str, ...]) -> str:
    matching = [name for name in header if name.lower() in names]
    if len(matching) != 1:
        raise ValueError(
            f"labels: {labels} has columns {', '.join(map(repr, header)) or '(none)'}, want a "
            f"header with exactly one of {', '.join(names)}"
        )
    return matching[0]


def open_image(path: Path) -> Image.Image:
    """The image in RGB, turned upright according to its EXIF orientation. Of several frames, the
    first one.

    Raises:
        Unusable: the file is unreadable, truncated or empty, or has 16 or 32 bits for each
            channel. It is a ValueError whose message names the file.
    """
    turned = optional("PIL.ImageOps").exif_transpose
    with _opened("images", path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels have mode {image.mode!r}, want 8 bits for each channel")
        upright: Image.Image = turned(image).convert("RGB")
    return upright


@contextlib.contextmanager
def _opened(argument: str, path: Path) -> Iterator[Image.Image]:
    opened = optional("PIL.Image").open
    try:
        with opened(path) as image:
            yield image
    except Exception as error:
        # On broken files, decoders raise errors of any type.
        reason = "unreadable" if argument == "images" else "mask_unreadable"
        raise Unusable(reason, f"{argument}: cannot read {path} as an image: {error}") from error


class MaskSource(Protocol):
    """A source of masks: it knows the objects in each image."""

    def objects(self, item: Item, size: tuple[int, int]) -> np.ndarray | None:
        """The number of the object at each pixel, uint8 (height, width): 1..k, or 0 for no object.
        None if there is no mask of this image.

        Args:
            item: the image.
            size: (width, height) of the image that `open_image` returns. Masks belong to the
                upright image.

        Raises:
            Unusable: the mask has a different size, cannot be read, or has more than
                `MOST_OBJECTS` objects. It is a ValueError.
        """
        ...


def open_masks(path: Path, background: Collection[int] = (0, 255)) -> MaskSource:
    """The masks in a folder, or in a file of COCO annotations.

    A folder has a PNG file for each image, at the path of the image with the ending .png
    ("cats/1.jpg" → "cats/1.png"), with one channel of 1, 8 or 16 bits, or a palette. Each value
    that is not in `background` is an object, wherever its pixels are. The default fits Pascal VOC.
    COCO-Stuff's pixel maps, where 0 is a person, need (255,). Masks of 0 and 255, where 255 is the
    object, need (0,).

    A file, *.json, has instances in the format of COCO and COCO-Stuff. `file_name` is the path of
    the image in its folder. Each annotation is an object, except crowds. Where objects overlap, the
    smaller one is in front. An image in the file without annotations has no objects.

    Args:
        path: the folder or the file.
        background: the values in PNG files that are not objects.

    Raises:
        ValueError: the message names the argument, what it got and what it needs.
        ImportError: a file needs pycocotools, which is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return _Folder(path, background)
    if path.suffix.lower() == ".json" and path.is_file():
        return _Coco(path)
    raise ValueError(
        f"masks: {path} is {'a file of another kind' if path.exists() else 'not there'}, "
        "want a folder of PNG files or a COCO *.json"
    )


class _Folder:
    def __init__(self, folder: Path, background: Collection[int]) -> None:
        self.folder = folder
        self.background = np.array(sorted(background), dtype=np.int64)

    def objects(self, item: Item, size: tuple[int, int]) -> np.ndarray | None:
        path = self.folder / PurePosixPath(item.name).with_suffix(".png")
        if not path.is_file():
            return None
        with _opened("masks", path) as image:
            values = np.asarray(image)
        if values.ndim != 2:
            raise Unusable(
                "mask_unreadable",
                f"masks: {path} has {values.shape[-1]} channels, want one, or a palette",
            )
        _check_size(str(path), (values.shape[1], values.shape[0]), size)
        values = values.astype(np.int64)
        return _numbered(np.where(np.isin(values, self.background), -1, values), -1, str(path))


class _Coco:
    def __init__(self, path: Path) -> None:
        self.path = path
        coco = optional("pycocotools.coco").COCO
        try:
            # pycocotools prints its progress
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = coco(str(path))
            self.images: dict[str, Any] = {
                image["file_name"]: image for image in self.coco.dataset["images"]
            }
            self.coco.dataset["annotations"]
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(
                f"masks: cannot read {path} as COCO annotations, want an object with images and "
                f"annotations: {error!r}"
            ) from error
        if len(self.images) < len(self.coco.dataset["images"]):
            raise ValueError(f"masks: {path} names some image twice, want each file_name once")

    def objects(self, item: Item, size: tuple[int, int]) -> np.ndarray | None:
        image = self.images.get(item.name)
        if image is None:
            return None
        where = f"{item.name!r} in {self.path}"
        _check_size(where, (image.get("width"), image.get("height")), size)
        annotations = [a for a in self.coco.imgToAnns[image["id"]] if not a.get("iscrowd")]
        masks = [self._mask(annotation, size) for annotation in annotations]
        numbers = np.zeros((size[1], size[0]), dtype=np.int64)
        for number, mask in sorted(enumerate(masks, 1), key=lambda n: n[1].sum(), reverse=True):
            numbers[mask] = number
        return _numbered(numbers, 0, where)

    def _mask(self, annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        try:
            mask: np.ndarray = self.coco.annToMask(annotation).astype(bool)
        except Exception as error:
            # On something that is not an outline, pycocotools' C code raises errors of any type.
            raise Unusable(
                "mask_unreadable",
                f"masks: annotation {annotation['id']} in {self.path} has no segmentation that can "
                f"be read, want polygons or RLE: {error!r}",
            ) from error
        _check_size(
            f"annotation {annotation['id']} in {self.path}", (mask.shape[1], mask.shape[0]), size
        )
        return mask


def optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}), want: {INSTALL}") from error


def _check_size(where: str, got: tuple[Any, Any], want: tuple[int, int]) -> None:
    if got != want:
        raise Unusable(
            "mask_size",
            f"masks: {where} is {got[0]} x {got[1]} pixels (width x height), want those of its "
            f"image upright, {want[0]} x {want[1]}",
        )


def _numbered(values: np.ndarray, none: int, where: str) -> np.ndarray:
    """`values` numbered 1..k in ascending order, with 0 for `none`."""
    objects = np.unique(values[values != none])
    if len(objects) > MOST_OBJECTS:
        raise Unusable(
            "mask_unreadable",
            f"masks: {where} has {len(objects)} objects, want at most {MOST_OBJECTS}",
        )
    return np.where(values == none, 0, np.searchsorted(objects, values) + 1).astype(np.uint8)


def names(sources: tuple[str, ...]) -> list[str]:
    """A name for each model: as much of the end of its path as tells them apart."""
    parts = [Path(source).parts for source in sources]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(set(sources)):
            return ends
    return list(sources)
