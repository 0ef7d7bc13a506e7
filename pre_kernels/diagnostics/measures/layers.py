"""All metrics of all layers in one object that takes image after image. Reports and callbacks print
its rows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import METRICS, inputs, state
from .contrast import Contrast, check_masks
from .fidelity import cka_of_moments, cknna
from .lens import LogitLens, decode
from .moments import Moments
from .probe import counts_in_test, knn_probe, linear_probe
from .reservoir import Reservoir
from .spatial import Spatial, check_grid
from .spectrum import Spectrum, SpectrumSummary


class LayerReport:
    """The metrics of this package for each layer, over a stream of images that come one at a time.

    ```python
    report = LayerReport()
    for h0, h16, h32, masks, label in images:
        hidden = {0: h0, 16: h16, 32: h32}
        report.update(hidden, anchor=h0, masks=masks, label=label)
    rows = report.rows()
    ```

    `rows` returns a dict of plain numbers and None for each layer, for json.dump or csv.DictWriter.

    | group     | metrics                                          | measured on images with     |
    |-----------|--------------------------------------------------|-----------------------------|
    | structure | cohesion, coupling, contrast (`contrast_ratio`)  | `masks`                     |
    |           | near, far, spatial_contrast                      | `grid`                      |
    | cosine    | cosine (`mean_cosine` with the anchor)           | an anchor of the same width |
    | spectrum  | the fields of `SpectrumSummary`                  | (all images)                |
    | cka       | cka, cka_debiased (`linear_cka` with the anchor) | (all images)                |
    | cknna     | cknna with the anchor, on a sample of tokens     | (all images)                |
    | probe     | linear_probe, knn_probe on each image's mean     | `label`                     |
    | (always)  | lens_share, lens_tokens (`LogitLens`)            | `logits`                    |

    Each row also has layer, images, tokens, and notes, which say why a metric is missing although
    its input was given. None means that a metric could not be measured. probe_test is the number of
    images in the probes' test part, and probe_chance the share of its most frequent class, which a
    guess gets right.

    Memory does not grow with the number of images. In float64 on the layer's device, a layer of
    width d with an anchor of width z takes 8·d² bytes for spectrum or cka, and 8·d·z more for cka:
    8.3 GiB for 33 layers of width 4,096. They take 2·d² and 2·d·z operations for each token. In
    float32 on the CPU, each layer also keeps `tokens`·d numbers for cknna and `labelled`·d for the
    probes. During training use the cheap groups, `metrics=("structure", "cosine", "probe")`: they
    take a few passes over the features.

    Args:
        metrics: some of `METRICS`.
        radius: as in `spatial_contrast`.
        tokens: how many tokens the sample for cknna holds.
        neighbours: as in `cknna`.
        labelled: how many labelled images are kept for the probes. Of more, a sample is kept.
        top: as in `LogitLens.result`.
        seed: the seed of both samples and of the probes' split. Give reports that will be merged
            different seeds.

    Raises:
        ValueError: the message names the argument, what it got and what it needs.
    """

    def __init__(
        self,
        metrics: Collection[str] = METRICS,
        *,
        radius: int | None = None,
        tokens: int = 1024,
        neighbours: int = 10,
        labelled: int = 4096,
        top: int = 5,
        seed: int = 0,
    ) -> None:
        if isinstance(metrics, str) or not set(metrics) <= set(METRICS):
            raise ValueError(f"metrics: got {metrics!r}, want some of {', '.join(METRICS)}")
        counts = {"tokens": tokens, "neighbours": neighbours, "labelled": labelled, "top": top}
        if radius is not None:
            counts["radius"] = radius
        for name, value in counts.items():
            inputs.check_positive(name, value)
        self.metrics = tuple(name for name in METRICS if name in metrics)
        self.radius = radius
        self.neighbours = neighbours
        self.top = top
        self.seed = seed
        self.images = self.tokens = 0
        self._widths: dict[int | str, int] = {}
        self._layers: dict[int, _Layer] = {}
        self._anchors = Moments()
        self._sample = Reservoir(tokens, seed)
        self._labelled = Reservoir(labelled, seed)

    @torch.no_grad()
    def update(
        self,
        hidden: Mapping[int, Tensor],
        anchor: Tensor,
        *,
        masks: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        label: int | None = None,
        logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Add one image. If it raises TypeError or ValueError, the report is unchanged.

        Args:
            hidden: the hidden states by layer number, (patches, width) each, floating point and
                finite. Every image needs the same layers.
            anchor: (patches, z), with which the layers are compared. To measure the anchor itself,
                pass it as a layer too.
            masks: (objects, patches) bool, as for `contrast_ratio`.
            grid: (rows, columns) of the patches, as for `spatial_contrast`.
            label: the class of the image.
            logits: as for `LogitLens`; called on the rows of each layer, in chunks.
        """
        widths = self._check(hidden, anchor)
        if masks is not None:
            masks = check_masks(masks, anchor[None])
        if grid is not None:
            grid = check_grid(grid, len(anchor))
        if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
            raise TypeError(f"label: got {type(label).__name__}, want an integer class")
        decoded = (
            {} if logits is None else {number: decode(h, logits) for number, h in hidden.items()}
        )
        layers = self._layers or {number: _Layer(self.radius) for number in sorted(hidden)}
        for number, counts in decoded.items():
            layers[number].lens.check(counts)

        self._widths = widths
        self._layers = layers
        self.images += 1
        self.tokens += len(anchor)
        units = {"structure", "cosine"} & set(self.metrics)
        anchor_unit = inputs.unit(anchor) if "cosine" in self.metrics else None
        if "cka" in self.metrics:
            self._anchors.add(anchor)
        for number, layer in layers.items():
            h = hidden[number].detach()
            if units:
                unit = inputs.unit(h)
                if anchor_unit is not None and unit.shape == anchor_unit.shape:
                    layer.cosine += (unit * anchor_unit.to(unit.device)).sum().item()
                if "structure" in self.metrics and masks is not None:
                    layer.contrast.add(unit[None], masks)
                if "structure" in self.metrics and grid is not None:
                    layer.spatial.add(unit[None], grid)
            if {"spectrum", "cka"} & set(self.metrics):
                h = h.double()
                layer.spectrum.add(h)
            if "cka" in self.metrics:
                layer.cross.add(h, anchor)
            if number in decoded:
                layer.lens.count(decoded[number])
        if "cknna" in self.metrics:
            everything: dict[Any, Tensor] = {**hidden, "anchor": anchor}
            self._sample.offer(len(anchor), lambda chosen: _taken(everything, chosen))
        if "probe" in self.metrics and label is not None:
            self._labelled.offer(1, lambda _: [(label, _means(hidden))])

    def merge(self, other: LayerReport) -> None:
        """Add the images that another report has seen, for example in another process. Except for
        the seed, its settings have to be the same."""
        if self._settings() != other._settings():
            raise ValueError(
                f"other: got settings {other._settings()}, want those here, {self._settings()}"
            )
        if not other.images:
            return
        if self._widths and self._widths != other._widths:
            raise ValueError(
                f"other: got layers of widths {other._widths}, want those here, {self._widths}"
            )
        for number, layer in other._layers.items():
            if layer.lens.total and (mine := self._layers.get(number)):
                mine.lens.check(layer.lens.counts)
        self._widths = other._widths
        self._layers = self._layers or {number: _Layer(self.radius) for number in other._layers}
        self.images += other.images
        self.tokens += other.tokens
        self._anchors.merge(other._anchors)
        for number, layer in self._layers.items():
            layer.merge(other._layers[number])
        self._sample.merge(other._sample)
        self._labelled.merge(other._labelled)

    def save(self, path: str | os.PathLike[str], **more: Any) -> None:
        """Write the state of the report to `path`, a safetensors file, whole or not at all.

        A report that `load` returns continues as this one would. `more` is saved with it: anything
        that JSON can hold.
        """
        state.save(Path(path), {"report": self, "more": more}, CLASSES)

    @staticmethod
    def load(
        path: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> tuple[LayerReport, dict[str, Any]]:
        """Read what `save` wrote: the report and `more`. Sums that were not on the CPU are then on
        `device`.

        Raises:
            FileNotFoundError: the file is not there.
            ValueError: the file is broken, or has another version. The message names it.
        """
        saved = state.load(Path(path), CLASSES, device)
        return saved["report"], saved["more"]

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each layer, in order, all with the same keys. ValueError if there are no
        images."""
        return list(self.iter_rows())

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """The same one by one, each computed when it is asked for. The probes of a layer may take
        seconds."""
        if not self.images:
            raise ValueError("images: got none so far, want at least one before the rows")
        sample = self._sample.items()
        labelled = self._labelled.items()
        for number, layer in self._layers.items():
            yield self._row(number, layer, sample, labelled)

    def _row(
        self, number: int, layer: _Layer, sample: list[dict[int | str, Tensor]], labelled: list[Any]
    ) -> dict[str, Any]:
        notes: list[str] = []

        def attempt(wanted: bool, metric: Callable[[], float]) -> float:
            try:
                return metric() if wanted else math.nan
            except ValueError as error:
                # One metric may fail, for example for lack of rows, while others can be measured.
                notes.append(str(error))
                return math.nan

        contrast = layer.contrast.result()
        spatial = layer.spatial.result()
        spectrum = "spectrum" in self.metrics
        cosine = "cosine" in self.metrics and self._widths[number] == self._widths["anchor"]
        moments = (layer.spectrum.moments, layer.cross, self._anchors)
        lens = layer.lens.result(self.top) if layer.lens.total else None

        def stacked(name: int | str) -> Tensor:
            return torch.stack([rows[name] for rows in sample])

        def probe(function: Callable[..., float]) -> float:
            features = torch.stack([means[number] for _, means in labelled])
            return function(
                features, torch.tensor([label for label, _ in labelled]), seed=self.seed
            )

        row: dict[str, Any] = {
            "layer": number,
            "images": self.images,
            "tokens": self.tokens,
            "cohesion": contrast.cohesion,
            "coupling": contrast.coupling,
            "contrast": contrast.ratio,
            "near": spatial.near,
            "far": spatial.far,
            "spatial_contrast": spatial.ratio,
            "cosine": layer.cosine / self.tokens if cosine else math.nan,
            **(
                layer.spectrum.result()._asdict()
                if spectrum
                else dict.fromkeys(SpectrumSummary._fields)
            ),
            "cka": attempt("cka" in self.metrics, lambda: cka_of_moments(*moments)),
            "cka_debiased": attempt(
                "cka" in self.metrics, lambda: cka_of_moments(*moments, debiased=True)
            ),
            "cknna": attempt(
                "cknna" in self.metrics,
                lambda: cknna(stacked(number), stacked("anchor"), self.neighbours),
            ),
            "lens_share": lens.share if lens else None,
            "lens_tokens": lens.tokens if lens else None,
            "linear_probe": attempt(bool(labelled), lambda: probe(linear_probe)),
            "knn_probe": attempt(bool(labelled), lambda: probe(knn_probe)),
            **_tested([label for label, _ in labelled]),
        }
        row = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in row.items()
        }
        return row | {"notes": "; ".join(dict.fromkeys(notes))}

    def _settings(self) -> dict[str, Any]:
        names = ("metrics", "radius", "neighbours", "top")
        limits = {"tokens": self._sample.limit, "labelled": self._labelled.limit}
        return {name: getattr(self, name) for name in names} | limits

    def _check(self, hidden: object, anchor: Tensor) -> dict[int | str, int]:
        """The width of each layer and of the anchor, once all of them are checked."""
        if (
            not isinstance(hidden, Mapping)
            or not hidden
            or not all(isinstance(number, int) for number in hidden)
        ):
            got = sorted(map(str, hidden)) if isinstance(hidden, Mapping) else type(hidden).__name__
            raise TypeError(f"hidden: got {got}, want tensors by layer number, at least one")
        inputs.check_rows("anchor", anchor, "(patches, width)")
        for number, h in hidden.items():
            inputs.check_rows(f"hidden[{number}]", h, "(patches, width)")
            inputs.check_aligned(f"hidden[{number}]", h, "anchor", anchor)
        widths: dict[int | str, int] = {
            number: hidden[number].shape[1] for number in sorted(hidden)
        }
        widths["anchor"] = anchor.shape[1]
        if self._widths and widths != self._widths:
            raise ValueError(
                f"hidden, anchor: got layers of widths {widths}, want those of the images before, "
                f"{self._widths}"
            )
        return widths


class _Layer:
    """The running sums of one layer."""

    def __init__(self, radius: int | None) -> None:
        self.contrast = Contrast()
        self.spatial = Spatial(radius)
        self.spectrum = Spectrum()
        self.cross = Moments()
        self.lens = LogitLens()
        self.cosine = 0.0

    def merge(self, other: _Layer) -> None:
        for name in ("contrast", "spatial", "spectrum", "cross", "lens"):
            getattr(self, name).merge(getattr(other, name))
        self.cosine += other.cosine


# Only objects of these classes are written to a file, or made from one.
CLASSES = (LayerReport, _Layer, Contrast, Spatial, Spectrum, Moments, LogitLens, Reservoir)


def _taken(
    tensors: Mapping[int | str, Tensor], chosen: Sequence[int]
) -> list[dict[int | str, Tensor]]:
    """The chosen rows as items of a sample. Each is a copy, so that keeping one row does not keep
    the whole tensor in memory."""
    items: list[dict[int | str, Tensor]] = [{} for _ in chosen]
    for name, tensor in tensors.items():
        rows = tensor.detach()[torch.tensor(chosen, device=tensor.device)].float().cpu()
        for item, row in zip(items, rows, strict=True):
            item[name] = row.clone()
    return items


def _tested(labels: list[int]) -> dict[str, Any]:
    """The size of the probes' test part, and the share of its most frequent class. None where the
    probes cannot be measured."""
    counts = torch.tensor(labels, dtype=torch.int64).unique(return_counts=True)[1]
    if len(counts) < 2 or counts.min() < 2:
        return {"probe_test": None, "probe_chance": None}
    tested = counts_in_test(counts)
    return {"probe_test": int(tested.sum()), "probe_chance": int(tested.max()) / int(tested.sum())}


def _means(hidden: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {number: h.detach().double().mean(0).float().cpu() for number, h in hidden.items()}
