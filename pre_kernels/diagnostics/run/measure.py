"""Images through a model into a report: what one image to measure is, and the loop over them."""

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
        inputs: the arguments of a forward for a batch of one, with this image alone.
        label: its class, for the probes.
        masks: (objects, patches) bool, for the contrast ratio.
        grid: (rows, columns) of its patches, for the spatial contrast.
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
    """Add each sample to `report`, one by one; yields its hidden states by layer, after they were
    added.

    The anchor is what enters the decoder, whether or not layer 0 is among the reader's. An image
    that a model cuts into tiles is one image here, without a grid. `lens`: with the logit lens,
    where the model has the parts for it.

    ```python
    report = LayerReport()
    with Reader(model, layers=(0, 16, 32)) as reader:
        for hidden in measure(reader, samples, report):
            pass
    print(report.rows())
    ```

    Raises:
        ValueError: what the report or the reader found wrong.
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
