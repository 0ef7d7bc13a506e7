"""Errors for a stage of a pipeline: a model whose other layers are on other processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .families import Parts

ADVICE = (
    "under pipeline parallelism attach to the stage that has the embeddings and layers 1 to l, "
    "with labels=None if its forward computes no loss; otherwise train with data or tensor "
    "parallelism"
)


def check_stage(
    model: nn.Module,
    parts: Parts,
    wanted: Sequence[tuple[int, Any]],
    labels: str | None,
    given: bool,
) -> None:
    """Raise a ValueError if a layer that PRe reads, the embeddings that it predicts, or the layers
    before the loss are not in this process.

    Args:
        model: the model that PRe is attached to, without PEFT around it.
        wanted: the layer and the anchor of each head.
        labels: the argument of `apply_pre`.
        given: whether the layers are an argument of it. If not, they are all layers of the model.
    """
    name = type(model).__name__
    layers = [*parts.layers]
    # Hooks are on the next layer too, and with `labels` the loss is made from the last one.
    last = len(layers)
    if labels is None:
        last = min(last, max(number for number, _ in wanted) + 1)
    for number, layer in enumerate(layers[:last], 1):
        if layer is None or type(layer) is nn.Identity:
            raise ValueError(
                f"model: decoder layer {number} of {len(layers)} in {name} is "
                f"{'None' if layer is None else type(layer).__name__}, as in a stage of a "
                f"pipeline, want layers 1..{last} in this process; {ADVICE}"
            )
    if not any(anchor == "pre_llm" for _, anchor in wanted):
        return
    text = model if parts.text is None else parts.text
    embeddings = getattr(text, "embed_tokens", text)
    if embeddings is None or type(embeddings) is nn.Identity:
        raise ValueError(
            f"model: embed_tokens of {name} is "
            f"{'None' if embeddings is None else type(embeddings).__name__}, as in a later stage "
            'of a pipeline, want it in this process, because anchor="pre_llm" predicts its output; '
            f"{ADVICE}"
        )
    indices = (getattr(m, "layer_idx", None) for m in layers[0].modules())
    first = next((index for index in indices if isinstance(index, int)), 0)
    if given and first != 0:
        raise ValueError(
            f"layers: got modules whose first is decoder layer {first + 1} of {name}, as in a "
            f"later stage of a pipeline, want layers from 1 on, because what enters layer "
            f'{first + 1} is not the embeddings that anchor="pre_llm" predicts; {ADVICE}'
        )
