"""bfloat16 weights with float32 sums, a mesh of two dimensions, and parameters on the CPU, under
FSDP2, FSDP1 and ZeRO: loss and every gradient are those that one process computes by hand."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from pre_kernels import fused_pre_loss

from ..slow import thinned
from .support.by_hand import copy_of, gradients, watch
from .support.processes import both, every
from .support.ranks import (
    PLAIN,
    TEXT_ONLY,
    TWO_IMAGES,
    UNEVEN,
    batches,
    by_hand,
    check,
    deepspeed,
    fully_sharded,
    made,
    need_deepspeed,
    shard,
    steps,
    whole_gradients,
    zero_steps,
)

FOUR = [[TWO_IMAGES, PLAIN], [PLAIN, PLAIN], [PLAIN, TWO_IMAGES], [TWO_IMAGES, TWO_IMAGES]]


def half_by_hand(samples: list[Any]) -> Any:
    """Like `by_hand`, with weights and activations in bfloat16. Each backward has its gradients in
    bfloat16, and they are added up in float32.

    Only parameters are cast, as all of these engines do it. The fused loss is called by itself
    here, because the plain one rounds elsewhere, and the layers below make more of such a
    difference than a wrong factor would be.
    """
    model, handle = made()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    head = copy_of(handle.head)
    handle.remove()
    seen = watch(model, "llava")
    losses = []
    sums: dict[str, Tensor | None] = {n: None for n, _ in model.named_parameters()}
    sums |= {f"pre_head.{n}": None for n in head}
    forwards = len(samples[0])
    for number in range(forwards):
        data = [batches(samples, rank, half=True)[number] for rank in range(len(samples))]
        mean = sum(int(d.visual.sum()) for d in data) / len(samples)
        total = torch.zeros(())
        for d in data:
            loss = model(**d.inputs).loss
            if d.visual.any():
                loss = loss + 0.5 * fused_pre_loss(
                    seen[2],
                    seen["embeds"].detach(),
                    *(head[name] for name in ("w1", "b1", "w2", "b2")),
                    rows=d.visual,
                    normalizer=torch.tensor(mean),
                )
            (loss / forwards).backward()
            total += loss.detach() / len(samples)
            own = gradients(model) | {f"pre_head.{n}": p.grad for n, p in head.items()}
            for name, gradient in own.items():
                if gradient is not None:
                    before = sums[name]
                    part = gradient.float() / len(samples)
                    sums[name] = part if before is None else before + part
            model.zero_grad()
            for parameter in head.values():
                parameter.grad = None
        losses.append(total)
    return losses, sums


OWN = pytest.mark.parametrize("own", thinned([True, False], 2), ids=["own group", "under the root"])


def fsdp2(samples: list[Any], own: bool, how: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    options: dict[str, Any] = {}
    if how == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    if how == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if how == "two dimensions":
        names = ("replicate", "shard")
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    model = shard(made(group="world")[0], own, **options)
    return steps(model, samples), whole_gradients(model)


@OWN
def test_fsdp2_in_bfloat16(own: bool) -> None:
    check(both(fsdp2, UNEVEN, own, "bfloat16"), half_by_hand(UNEVEN))


@pytest.mark.slow
@OWN
def test_fsdp2_on_two_dimensions(own: bool) -> None:
    """HSDP: parameters are split over two ranks, and gradients averaged over the two pairs."""
    check(every(4, fsdp2, FOUR, own, "two dimensions"), by_hand(FOUR))


def test_fsdp2_with_parameters_on_the_cpu() -> None:
    check(both(fsdp2, UNEVEN, False, "offload"), by_hand(UNEVEN))


def fsdp1(samples: list[Any], own: bool, how: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecision, ShardingStrategy

    options: dict[str, Any] = {}
    if how == "bfloat16":
        options["mixed_precision"] = MixedPrecision(torch.bfloat16, reduce_dtype=torch.float32)
    if how == "two dimensions":
        options["device_mesh"] = init_device_mesh("cpu", (2, 2))
        options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
    wrapped = fully_sharded(made(group="world")[0], own, **options)
    return steps(wrapped, samples), whole_gradients(wrapped)


@OWN
def test_fsdp1_in_bfloat16(own: bool) -> None:
    check(both(fsdp1, TEXT_ONLY, own, "bfloat16"), half_by_hand(TEXT_ONLY))


@pytest.mark.slow
@OWN
def test_fsdp1_on_two_dimensions(own: bool) -> None:
    check(every(4, fsdp1, FOUR, own, "two dimensions"), by_hand(FOUR))


def zero(samples: list[Any], stage: int) -> Any:
    deepspeed()
    more = {
        "bf16": {"enabled": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    return zero_steps(made(group="world")[0], samples, stage, **more)


def check_sums_in_bfloat16(ranks: list[Any], wanted: Any) -> None:
    """For engines that round gradients elsewhere: each part of the model as a whole."""
    for *found, loss in zip(*(rank[0] for rank in ranks), wanted[0], strict=True):
        torch.testing.assert_close(torch.stack(found).mean(), loss)
    for _, found in ranks:
        unused = [found[name] for name, gradient in wanted[1].items() if gradient is None]
        assert not any(g is not None and g.any() for g in unused)
        for part in ("pre_head", "language_model", "vision_tower"):
            names = [name for name, g in wanted[1].items() if part in name and g is not None]
            all_of = [torch.cat([g[name].flatten() for name in names]) for g in (found, wanted[1])]
            bound = 4 * torch.finfo(torch.bfloat16).eps * all_of[1].norm()
            assert (all_of[0] - all_of[1]).norm() <= bound, part


def test_zero2_in_bfloat16() -> None:
    need_deepspeed()
    # DeepSpeed 0.19.6 rounds the float32 sums to bfloat16 before it reduces them.
    old = Version(version("deepspeed")) < Version("0.19.8")
    (check_sums_in_bfloat16 if old else check)(both(zero, UNEVEN, 2), half_by_hand(UNEVEN))


@pytest.mark.slow
def test_zero3_in_bfloat16() -> None:
    """ZeRO-3 has a backward of its own for linear layers."""
    need_deepspeed()
    check_sums_in_bfloat16(both(zero, UNEVEN, 3), half_by_hand(UNEVEN))
