"""Processes that train together need the same PRe: they exchange its settings once, and where these
differ every process raises an error."""

from __future__ import annotations

import os
import zlib
from typing import Any

import torch
from torch import nn

from pre_kernels import PreHead, __version__

from .checkpoint import describe
from .distributed import initialized, named_failure
from .head_options import HeadOptions
from .objective import Objective


def settings(
    handle: Any, objective: Objective, options: HeadOptions, labels: str | None
) -> dict[str, Any]:
    """The settings of a `PreHandle` that have to be the same on every process."""
    return {
        **describe(handle.head, handle.settings()),
        "weight": handle.weight,
        "enabled": handle.enabled,
        "fraction": objective.fraction,
        "nonfinite": objective.nonfinite,
        "gram_over": objective.gram_over,
        "mask_fn": "none" if objective.mask_fn is None else "a callable",
        "labels": labels,
        **vars(options),
    }


def agree_on_training(handle: Any) -> None:
    """A training of all processes begins: compare their handles, of which any may be None.
    Collective.

    Raises:
        ValueError: on every process, if their handles differ.
    """
    if handle is None:
        _compare(None, None)
    else:
        handle.agree(whole=True)


def compare(
    head: nn.Module, own: dict[str, Any], objective: Objective, whole: bool, first: bool
) -> None:
    """Compare a handle's head and its settings `own` with those of other processes. Collective.

    The weights of the heads are compared where nothing makes them equal: in a loop of one's own,
    and under tensor parallelism. A data parallel trainer copies them when it wraps the model.

    Args:
        whole: whether all processes take part. If not, those do that the terms are counted over,
            and those that have other parts of the decoder layers' weights.
        first: whether the head has not been trained yet. Later it may differ in the last bits.

    Raises:
        ValueError: on every process that takes part, if they differ.
    """
    if not initialized():
        return
    groups = _meshes(objective.parts.layers)
    compares_weights = first and (bool(groups) or not whole)
    if whole:
        groups = [None]
    elif objective.group is not None:
        groups.append(objective.group.group)
    if groups:
        own = own | {"weights": digest(head) if compares_weights else None}
    for group in groups:
        _compare(own, group)


def check_same_everywhere(head: nn.Module) -> None:
    """Raise a ValueError on every process if their heads differ. Collective; runs only under
    PRE_KERNELS_DEBUG=1."""
    if os.environ.get("PRE_KERNELS_DEBUG") == "1":
        _compare({"weights": digest(head)}, None)


def digest(head: nn.Module) -> int | None:
    """A number that two heads share if their weights are equal bit for bit. None if this process
    has only a part of them. Waits for the device."""
    parameters: list[nn.Parameter] = []
    for module in head.modules():
        if isinstance(module, PreHead):
            own = dict(module.named_parameters(recurse=False))
            # FSDP1 and ZeRO-3 leave parts of other shapes, or none; FSDP2 leaves DTensors.
            if {name: tuple(p.shape) for name, p in own.items()} != module.shapes:
                return None
            parameters += own.values()
    if any(p.is_meta or hasattr(p, "full_tensor") for p in parameters):
        return None
    found = 0
    for parameter in parameters:
        # A copy, because FSDP resizes its storage, which a view by numpy would forbid.
        row: Any = parameter.detach().to("cpu", copy=True).contiguous().flatten()
        found = zlib.crc32(row.view(torch.uint8).numpy(), found)
    return found


def _meshes(layers: nn.ModuleList) -> list[Any]:
    """The groups of processes that have other parts of the layers' weights, under tensor
    parallelism. FSDP gathers the weights, so every process has all of them when it computes."""
    if any(hasattr(type(m), "unshard") for layer in layers for m in layer.modules()):
        return []
    parameters: Any = layers.parameters()
    mesh = next((p.device_mesh for p in parameters if hasattr(p, "full_tensor")), None)
    return [] if mesh is None else list(mesh.get_all_groups())


def _compare(own: dict[str, Any] | None, group: Any) -> None:
    if not initialized() or torch.distributed.get_world_size(group) == 1:
        return
    every: list[Any] = [None] * torch.distributed.get_world_size(group)
    with named_failure("the comparison of the settings of all processes"):
        torch.distributed.all_gather_object(every, (__version__, own), group=group)
    ranks = torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD)
    _check_alike(dict(zip(ranks, every, strict=True)))


def _check_alike(every: dict[int, tuple[str, dict[str, Any] | None]]) -> None:
    """Raise a ValueError if the versions and settings by rank differ. No rank, or every rank, may
    be without settings."""
    versions = {rank: version for rank, (version, _) in every.items()}
    if len({*versions.values()}) > 1:
        raise ValueError(
            f"pre_kernels: got version {_by_value(versions)}, want one version on every rank; "
            "install the same version in each environment"
        )
    found = {rank: own for rank, (_, own) in every.items()}
    missing = [rank for rank, own in found.items() if own is None]
    if len(missing) == len(found):
        return
    if missing:
        raise ValueError(
            f"handle: got none on ranks {missing}, whose model has no PRe, want one on every rank, "
            f"like ranks {[rank for rank in found if rank not in missing]}; call apply_pre on "
            "every rank"
        )
    owns = {rank: own or {} for rank, own in found.items()}
    names = list(dict.fromkeys(name for own in owns.values() for name in own if name != "weights"))
    differing = [
        f"{name} {_by_value(values)}"
        for name in names
        if len({*(values := {rank: repr(own.get(name)) for rank, own in owns.items()}).values()})
        > 1
    ]
    if differing:
        raise ValueError(
            f"apply_pre: got {'; '.join(differing)}; want the same settings on every rank: call it "
            "with the same arguments on every rank"
        )
    weights = {rank: own.get("weights") for rank, own in owns.items()}
    known = [value for value in weights.values() if value is not None]
    others = [rank for rank, value in weights.items() if value not in (None, *known[:1])]
    if others:
        raise ValueError(
            f"head: its weights on ranks {others} differ from those on rank "
            f"{next(rank for rank, value in weights.items() if value is not None)}, want the same "
            "head on every rank; give all ranks the same seed before apply_pre"
        )


def _by_value(values: dict[int, str]) -> str:
    """Such as "0.5 on ranks [0, 2], 1.0 on ranks [1]"."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on ranks {those}" for value, those in ranks.items())
