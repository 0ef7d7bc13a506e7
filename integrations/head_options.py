"""How the head is trained: its optimizer groups, and λ along the training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pre_kernels.checks import choice

SCHEDULES = ("constant", "cosine")
MARK = "pre_head"  # the key of the groups that `own_groups` made

# optimizers whose groups are not what they step by
NO_GROUPS = {
    "LayerWiseDummyOptimizer": "which steps each parameter by an optimizer of its own; use the optim without layerwise",
    "Lomo": "which steps all parameters alike in the backward pass; use another optim",
    "AdaLomo": "which steps all parameters alike in the backward pass; use another optim",
}


@dataclass(frozen=True)
class Training:
    """The arguments of `apply_pre` of the same names.

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
                number(name, getattr(self, name))
        number("warmup", self.warmup)
        if self.warmup > 1:
            raise ValueError(f"warmup: got {self.warmup}, want a share of the training, 0..1")

    @property
    def scheduled(self) -> bool:
        """Whether λ changes along the training."""
        return self.schedule != "constant" or self.warmup > 0

    def factor(self, progress: float) -> float:
        """What λ is multiplied by at this share of the training (0..1)."""
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
        found = [group for group in (weights, biases) if group["params"]]
        return found if self.head_lr is None else [{**group, "lr": self.head_lr} for group in found]


def own_groups(
    optimizer: Any, groups: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], Exception]]:
    """Give each of `groups` a group of its own in `optimizer`, before its first step.

    What a group does not say it takes from the one where its parameters were, or from the
    optimizer's defaults if they were in none. Groups that are there already stay. Returned are
    those that the optimizer refuses, and why.
    """
    refused = []
    for group in groups:
        mine = {id(p) for p in group["params"]}
        sources = [g for g in optimizer.param_groups if any(id(p) in mine for p in g["params"])]
        if any(MARK in source for source in sources):
            continue
        settings = {k: v for k, v in sources[0].items() if k != "params"} if sources else {}
        error = None if sources else _refusal(optimizer, group["params"])
        if error is not None:
            refused.append((group, error))
            continue
        for source in sources:
            source["params"] = [p for p in source["params"] if id(p) not in mine]
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


def as_asked(groups: list[dict[str, Any]], optimizer: Any) -> bool:
    """Whether `optimizer`, which has all parameters of `groups`, gives them their lr, and the
    weights their decay."""
    there = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for group in groups:
        for parameter in group["params"]:
            found = there[id(parameter)]
            lr, decay = (
                found.get("initial_lr", found["lr"]),
                found.get("weight_decay"),
            )  # a schedule changes "lr"
            if group.get("lr", lr) != lr or (
                parameter.dim() > 1 and group.get("weight_decay", decay) != decay
            ):
                return False
    return True


def number(name: str, value: Any) -> float:
    """`value` as a float; TypeError or ValueError if it is no finite number ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, want a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: got {value}, want a finite number ≥ 0")
    return float(value)
