"""`Sample`, an image to measure, and `measure`, which adds samples to a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pre_kernels.integrations import Reader

from ..measures.layers import LayerReport


@dataclass(frozen=True)
class Sample:
    """One image to measure.

    Attributes:
        inputs: the arguments of a forward for a batch of one, with only this image.
        label: the class of the image, for the probes.
        masks: (objects, patches) bool, for the contrast ratio.
        grid: (rows, columns) of the patches, for the spatial contrast.
    """

    inputs: Mapping[str, Any]
    label: int | None = None
    masks: Tensor | None = None
    grid: tuple[int, int] | None = None


def measure(
    reader: Reader,
    samples: Iterable[Sample],
    report: LayerReport,
    *,
    lens: bool = False,
    call: Callable[..., Any] | None = None,
    device: torch.device | str | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Add each sample to `report`, one by one, and yield its hidden states by layer once they are
    added.

    The anchor is the input of the decoder, whether or not the reader reads layer 0. An image that a
    model cuts into tiles is one image here, without a grid.

    ```python
    report = LayerReport()
    with Reader(model, layers=(0, 16, 32)) as reader:
        for hidden in measure(reader, samples, report):
            pass
    print(report.rows())
    ```

    Args:
        reader: reads the hidden states of the model.
        samples: the images.
        report: takes the measurements.
        lens: whether to measure the logit lens, if the model has the parts for it.
        call: as in `Reader.read`.
        device: where the tensors of a sample's inputs go. None: they stay where they are.

    Raises:
        ValueError, TypeError: from the report or the reader.
    """
    logits = reader.logits() if lens else None
    for sample in samples:
        inputs = {
            name: value.to(device) if device is not None and torch.is_tensor(value) else value
            for name, value in sample.inputs.items()
        }
        images = reader.read(inputs, call)
        hidden = {
            number: torch.cat([image.hidden[number] for image in images])
            for number in reader.layers
        }
        report.update(
            hidden,
            torch.cat([image.anchor for image in images]),
            masks=sample.masks,
            grid=sample.grid if len(images) == 1 else None,
            label=sample.label,
            logits=logits,
        )
        yield hidden
