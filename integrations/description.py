"""The text of `print(handle)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pre_kernels import PreHead

from .objective import Objective


def describe(handle: Any, objective: Objective, labels: str | None, removed: bool) -> str:
    """The state and the settings of a `PreHandle`, in ASCII, which every terminal can print.

    It reads no tensor, so it never waits for the device.

    Args:
        handle: the handle.
        objective: its objective.
        labels: its argument `labels`.
        removed: whether `remove()` was called.
    """
    head = None if removed else getattr(handle, "head", None)
    lines = [
        f"{'removed' if removed else _state(handle)}: {type(handle.model).__name__}",
        f"{_layers(objective.layers, handle.depth)}, weight {handle.described_weight()}",
        ", ".join(_objective(objective, labels)),
        # PEFT may keep a copy of a head beside it.
        *dict.fromkeys(() if head is None else _heads(head)),
    ]
    between = "\n  "
    return f"{type(handle).__name__}({between.join(lines)})"


def _state(handle: Any) -> str:
    if not handle.enabled:
        return "off (enabled is False)"
    if not handle.weight:
        return "off (weight is 0)"
    return "on" if handle.model.training else "on (but the model is in eval mode)"


def _layers(numbers: tuple[int, ...], depth: int) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} of {depth}"


def _objective(objective: Objective, labels: str | None) -> Iterator[str]:
    anchors: list[Any] = [target.anchor for target in objective.targets]
    names = [a if isinstance(a, str) else getattr(a, "__name__", type(a).__name__) for a in anchors]
    yield f"loss {objective.loss}{' over the batch' if objective.gram_over == 'batch' else ''}"
    yield f"anchor {', '.join(names if len({*names}) > 1 else names[:1])}"
    if objective.anchor_norm != "none":
        yield f"anchor_norm {objective.anchor_norm}"
    yield f"level {objective.level}"
    if objective.weighting != "token":
        yield f"weighting {objective.weighting}"
    if objective.fraction != 1:
        yield f"fraction {objective.fraction:g}"
    if objective.nonfinite != "propagate":
        yield f"nonfinite {objective.nonfinite}"
    if labels is None:
        yield "added by handle.loss()"


def _heads(head: nn.Module) -> Iterator[str]:
    """A line for each predictor; wrappers of FSDP1 may be around it."""
    frozen = {p.requires_grad for p in head.parameters()} == {False}
    for module in head.modules():
        if isinstance(module, PreHead):
            dtype = next((str(p.dtype) for p in module.parameters()), "no parameters")
            norm = "" if module.norm is None else f"{module.norm} norm, "
            widths = [module.dim, *[module.hidden_dim] * (module.depth - 1), module.out_dim]
            yield (
                f"head {norm}{' -> '.join(map(str, widths))}, "
                f"{module.activation}, {dtype.removeprefix('torch.')}{', frozen' * frozen}"
            )
