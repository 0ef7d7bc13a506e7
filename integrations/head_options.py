"""How the head is trained: its optimizer groups, and λ along the training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pre_kernels.checks import choice, nonnegative

SCHEDULES = ("constant", "cosine")
MARK = "pre_head"  # the key of the groups that `add_head_groups` made

# optimizers that do not step by the groups they have, and what to do
NO_GROUPS = {
    "LayerWiseDummyOptimizer": (
        "which steps each parameter by an optimizer of its own; use the optim without layerwise"
    ),
    "Lomo": "which steps all parameters alike in the backward pass; use another optim",
    "AdaLomo": "which steps all parameters alike in the backward pass; use another optim",
}


@dataclass(frozen=True)
class HeadOptions:
    """How the head is trained: the arguments of `apply_pre` of the same names.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted.
    """

    head_lr: float | None = None
    head_weight_decay: float | None = None
    schedule: str = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        choice("schedule", self.schedule, SCHEDULES)
        for name in ("head_lr", "head_weight_decay"):
            if getattr(self, name) is not None:
                nonnegative(name, getattr(self, name))
        nonnegative("warmup", self.warmup)
        if self.warmup > 1:
            raise ValueError(f"warmup: got {self.warmup}, want a share of the training, 0..1")

    @property
    def scheduled(self) -> bool:
        """Whether λ changes along the training."""
        return self.schedule != "constant" or self.warmup > 0

    def factor(self, progress: float) -> float:
        """What λ is multiplied by at this progress, 0..1."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "constant" or self.warmup == 1:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))

    def groups(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Optimizer groups of those that require grad: weights, and biases, which are not decayed.

        Told apart by name: sharded, all have one dimension.
        """
        weights: dict[str, Any] = {"params": []}
        biases: dict[str, Any] = {"params": [], "weight_decay": 0.0}
        for name, parameter in parameters:
            if parameter.requires_grad:
                (biases if name.endswith(("b1", "b2")) else weights)["params"].append(parameter)
        if self.head_weight_decay is not None:
            weights["weight_decay"] = self.head_weight_decay
        groups = [group for group in (weights, biases) if group["params"]]
        if self.head_lr is not None:
            for group in groups:
                group["lr"] = self.head_lr
        return groups


class ScheduledWeight:
    """λ, its schedule, and where in the training it is."""

    def __init__(self, weight: float, options: HeadOptions) -> None:
        self.weight = weight
        self._options = options
        self._progress = 0.0
        self._progressed = False  # whether `progress` was ever set

    @property
    def weight(self) -> float:
        """λ, the weight of L_PRe in the loss."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = nonnegative("weight", value)

    @property
    def progress(self) -> float:
        """Where in the training the next step is, 0..1; `patch_trainer` sets it to the middle of
        each step."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        if nonnegative("progress", value) > 1:
            raise ValueError(f"progress: got {value}, want 0..1")
        self._progress = float(value)
        self._progressed = True

    @property
    def scheduled_weight(self) -> float:
        """λ as the schedule has it at `progress`. At 0 the head is not in the graph, which DDP has
        to be told of."""
        return self._weight * self._options.factor(self._progress)


def add_head_groups(
    optimizer: Any, groups: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], Exception]]:
    """Give each of `groups` a group of its own in `optimizer`, before its first step.

    What a group does not say it takes from the one where its parameters were, or from the
    optimizer's defaults if they were in none. Groups that are there already stay. Returned are
    those that the optimizer refuses, and why.
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
    """Why an optimizer that has matrices alone takes no vectors (Muon), found out on another of its
    kind."""
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
    """Whether `optimizer`, which has all parameters of `groups`, gives them their lr, and the
    weights their decay."""
    there = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for group in groups:
        for parameter in group["params"]:
            its_group = there[id(parameter)]
            lr = its_group.get("initial_lr", its_group["lr"])  # a schedule changes "lr"
            decay = its_group.get("weight_decay")
            if group.get("lr", lr) != lr or (
                parameter.dim() > 1 and group.get("weight_decay", decay) != decay
            ):
                return False
    return True
