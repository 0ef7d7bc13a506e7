"""How the head is trained: its optimizer groups, and the schedule of λ."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pre_kernels.checks import choice, nonnegative

SCHEDULES = ("constant", "cosine")
MARK = "pre_head"  # `add_head_groups` puts this key into the groups it makes

# Optimizers that ignore their parameter groups, with the rest of the warning about each.
NO_GROUPS = {
    "LayerWiseDummyOptimizer": (
        "which steps each parameter by an optimizer of its own; use the optim without layerwise"
    ),
    "Lomo": "which steps all parameters alike in the backward pass; use another optim",
    "AdaLomo": "which steps all parameters alike in the backward pass; use another optim",
}


@dataclass(frozen=True)
class HeadOptions:
    """How the head is trained. The fields are the arguments of `apply_pre` of the same names.

    Raises:
        ValueError, TypeError: with the argument, the value it got and the value it needs.
    """

    head_lr: float | None = None
    head_weight_decay: float | None = None
    schedule: str = "constant"
    warmup: float = 0.0
    head_trainable: bool = True

    def __post_init__(self) -> None:
        choice("schedule", self.schedule, SCHEDULES)
        if not isinstance(self.head_trainable, bool):
            raise TypeError(f"head_trainable: got {self.head_trainable!r}, want True or False")
        for name in ("head_lr", "head_weight_decay"):
            value = getattr(self, name)
            if value is not None and not self.head_trainable:
                raise ValueError(f"{name}: got {value} with head_trainable=False, want None")
            if value is not None:
                nonnegative(name, value)
        nonnegative("warmup", self.warmup)
        if self.warmup > 1:
            raise ValueError(
                f"warmup: got {self.warmup}, want a share of the training, 0..1 (steps of warm-up "
                "/ steps)"
            )

    @property
    def scheduled(self) -> bool:
        """Whether λ changes during the training."""
        return self.schedule != "constant" or self.warmup > 0

    def factor(self, progress: float) -> float:
        """The factor of λ at this progress, both in 0..1."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "constant" or self.warmup == 1:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))

    def groups(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Optimizer groups of the parameters that require grad: one of weights, and one of biases
        and of the norm, which are not decayed.

        Weights are recognised by name, because a sharded weight may have one dimension too.
        """
        weights: dict[str, Any] = {"params": []}
        biases: dict[str, Any] = {"params": [], "weight_decay": 0.0}
        for name, parameter in parameters:
            if parameter.requires_grad:
                matrix = name.endswith(("w1", "w2", "w3"))
                (weights if matrix else biases)["params"].append(parameter)
        if self.head_weight_decay is not None:
            weights["weight_decay"] = self.head_weight_decay
        groups = [group for group in (weights, biases) if group["params"]]
        if self.head_lr is not None:
            for group in groups:
                group["lr"] = self.head_lr
        return groups


class ScheduledWeight:
    """λ with its schedule and the progress of the training."""

    def __init__(self, weight: float, options: HeadOptions) -> None:
        self.weight = weight
        self._options = options
        self._progress = 0.0
        self._progressed = False  # whether `progress` was ever set

    @property
    def weight(self) -> float:
        """λ, the weight of L_PRe in the loss, before the schedule."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = nonnegative("weight", value)

    @property
    def progress(self) -> float:
        """The progress of the training at the next step, in 0..1. `patch_trainer` sets it to the
        middle of each step."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        if nonnegative("progress", value) > 1:
            raise ValueError(f"progress: got {value}, want 0..1, such as (step + 0.5) / steps")
        self._progress = float(value)
        self._progressed = True

    @property
    def scheduled_weight(self) -> float:
        """λ at `progress`, according to the schedule. At 0 the head is not in the graph, so DDP
        needs `find_unused_parameters`."""
        return self._weight * self._options.factor(self._progress)

    def described_weight(self) -> str:
        """λ, with its schedule if it has one."""
        if not self._options.scheduled:
            return f"{self.weight:g}"
        warmup = f" after a warmup of {self._options.warmup:g}" if self._options.warmup else ""
        return (
            f"{self.weight:g}, {self._options.schedule}{warmup} "
            f"({self.scheduled_weight:.3g} at progress {self.progress:.3g})"
        )


def add_head_groups(
    optimizer: Any, groups: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], Exception]]:
    """Add each of `groups` to `optimizer` as a separate group, before the first step.

    Settings that a group lacks come from the group in which its parameters were before, or from the
    optimizer's defaults if they were in none. Groups of the head that are there already stay.

    Returns:
        The groups that the optimizer refuses, each with the error.
    """
    refused = []
    for group in groups:
        own = {id(p) for p in group["params"]}
        sources = [g for g in optimizer.param_groups if any(id(p) in own for p in g["params"])]
        if any(MARK in source for source in sources):
            continue
        settings = {k: v for k, v in sources[0].items() if k != "params"} if sources else {}
        error = None if sources else _refusal(optimizer, group["params"])
        if error is not None:
            refused.append((group, error))
            continue
        for source in sources:
            source["params"] = [p for p in source["params"] if id(p) not in own]
        optimizer.add_param_group({**settings, **group, MARK: True})
    return refused


def _refusal(optimizer: Any, parameters: list[Any]) -> Exception | None:
    """The error with which an optimizer that has only matrices (Muon) refuses vectors, or None. It
    is found with a second optimizer of the same class."""
    dims = {p.dim() for group in optimizer.param_groups for p in group["params"]}
    if dims != {2} or all(p.dim() == 2 for p in parameters):
        return None

    def trial(*shape: int) -> Exception | None:
        try:
            type(optimizer)([torch.nn.Parameter(torch.zeros(shape))], **optimizer.defaults)
        except Exception as error:
            return error
        return None

    return None if trial(2, 2) is not None else trial(2)


def has_requested_settings(groups: list[dict[str, Any]], optimizer: Any) -> bool:
    """Whether `optimizer` uses the learning rates that `groups` ask for, and their weight decay for
    the weights. It must have all their parameters."""
    there = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for group in groups:
        for parameter in group["params"]:
            its_group = there[id(parameter)]
            lr = its_group.get("initial_lr", its_group["lr"])  # schedulers change "lr"
            decay = its_group.get("weight_decay")
            if group.get("lr", lr) != lr or (
                parameter.dim() > 1 and group.get("weight_decay", decay) != decay
            ):
                return False
    return True
