"""Shared by tests on two processes: samples for each rank, the model, its loss and gradients by
hand, and engines."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from pre_kernels.integrations import apply_pre

from .by_hand import assert_same_gradients, copy_of, expected_gradients, gradients, pre_loss, watch
from .tiny.models import Batch, batch, build
from .tiny.training import one_image

PLAIN = one_image(3)
TWO_IMAGES = [("text", 4), ("image", 8, 8), ("text", 1), ("image", 8, 8), ("text", 8)]
TEXT = [("text", 7)]
# A dummy image that the attention mask hides, as some data pipelines add.
MASKED = [
    ("image", 8, 8),
    ("text", 7),
]
# The samples of each rank, one forward per entry.
UNEVEN = [[TWO_IMAGES, PLAIN], [PLAIN, TWO_IMAGES]]
TEXT_ONLY = [[TWO_IMAGES, PLAIN], [TEXT, TWO_IMAGES]]
DUMMY = [[TWO_IMAGES, PLAIN], [MASKED, TWO_IMAGES]]


def batches(samples: list[Any], rank: int) -> list[Batch]:
    found = []
    for number, sample in enumerate(samples[rank]):
        data = batch("llava", [sample], seed=2 * number + rank)
        if sample is MASKED or sample == MASKED:
            data.inputs["attention_mask"][0, :5] = 0
            data.visual[:] = False
            data.lengths.clear()
        found.append(data)
    return found


def made(frozen: bool = False, **options: Any) -> tuple[nn.Module, Any]:
    """A model and its handle, the same on every call. If `frozen`, its vision part has no
    gradients."""
    model = build("llava")
    if frozen:
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
    return model, apply_pre(model, **options)


def by_hand(
    samples: list[Any],
    group: bool = True,
    frozen: bool = False,
    level: str = "patch",
    forwards: int = 2,
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """The mean over the ranks of each forward's loss and of the accumulated gradients."""
    model, handle = made(frozen)
    head = copy_of(handle.head)
    handle.remove()
    seen = watch(model, "llava")
    losses = []
    for number in range(forwards):
        data = [batches(samples, rank)[number] for rank in range(2)]
        counts = [len(d.lengths) if level == "image" else int(d.visual.sum()) for d in data]
        total = torch.zeros(())
        for d, count in zip(data, counts, strict=True):
            loss = model(**d.inputs).loss / 2
            divisor = max(sum(counts), 1) if group else 2 * max(count, 1)
            loss = loss + 0.5 * pre_loss(seen, d, [2], head, level, reduction="sum") / divisor
            (loss / forwards).backward()
            total += loss.detach()
        losses.append(total)
    return losses, gradients(model) | {f"pre_head.{n}": p.grad for n, p in head.items()}


def plainly(data: Batch, level: str = "patch") -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients of one forward on one process, with the head that `made` makes."""
    model, handle = made()
    head = handle.head
    handle.remove()
    return expected_gradients(model, "llava", data, head, [2], level=level)


def check(ranks: list[Any], wanted: tuple[list[Tensor], dict[str, Tensor | None]]) -> None:
    """(losses, gradients) of both ranks."""
    for zero, other, loss in zip(ranks[0][0], ranks[1][0], wanted[0], strict=True):
        torch.testing.assert_close((zero + other) / 2, loss)
    for _, gradient in ranks:
        # A parameter that no rank used has no gradient, or zeros.
        seen = (
            {n: gradient[n] for n in wanted[1]} if gradient.keys() >= wanted[1].keys() else gradient
        )
        zeros = {
            n: g
            for n, g in seen.items()
            if g is not None and wanted[1].get(n) is None and not g.any()
        }
        assert_same_gradients({n: None if n in zeros else g for n, g in seen.items()}, wanted[1])


def steps(
    model: nn.Module, samples: list[Any], no_sync: Any = None, backward: Any = None
) -> list[Tensor]:
    """The losses of this rank's forwards. Their gradients are accumulated, and the last backward
    synchronises."""
    data = batches(samples, torch.distributed.get_rank())
    losses = []
    for number, d in enumerate(data):
        last = number == len(data) - 1
        with contextlib.nullcontext() if last or no_sync is None else no_sync():
            loss = model(**d.inputs).loss
            (loss / len(data)).backward() if backward is None else backward(loss)
        losses.append(loss.detach())
    return losses


def shard(model: nn.Module, own: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.language_model.layers:
        fully_shard(layer)
    if own:
        for head in (
            model.pre_head if isinstance(model.pre_head, nn.ModuleList) else [model.pre_head]
        ):
            fully_shard(head)
    return fully_shard(model)


def need_deepspeed() -> None:
    """Skip a test if the package is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")


def need_zero_init() -> None:
    """Skip a test in which `from_pretrained` under zero.Init cannot be relied on."""
    need_deepspeed()
    if transformers.__version__.startswith("4."):
        pytest.skip(
            "transformers 4.57 on torch 2.9 and gloo loads wrong weights under zero.Init now and "
            "then, by itself"
        )


class AllOf:
    """Several collectives, as one to wait for."""

    def __init__(self, works: list[Any]) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def gather_each(
    _: Any, outputs: list[Tensor], inputs: list[Tensor], group: Any = None, async_op: bool = False
) -> AllOf | None:
    """DeepSpeed's `all_gather_coalesced`, waiting for every tensor.

    DeepSpeed waits for the last one only. gloo runs collectives in several threads, so an earlier
    one may not be done by then, and ZeRO-3 takes memory that nothing was written to for weights.
    """
    gather = torch.distributed.all_gather_into_tensor
    pairs = zip(outputs, inputs, strict=True)
    works = AllOf([gather(whole, part, group=group, async_op=True) for whole, part in pairs])
    if async_op:
        return works
    works.wait()
    return None


def deepspeed() -> Any:
    """The package, without the C++ operator that it would compile for sums in shared memory, and
    with a gather that is safe on gloo."""
    import deepspeed
    from deepspeed.comm.torch import TorchBackend

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    TorchBackend.all_gather_coalesced = gather_each
    return deepspeed


def config(stage: int, accumulation: int = 2, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **more,
    }


def engine(
    model: nn.Module,
    stage: int,
    kind: Any = torch.optim.Adam,
    rate: float = 0.1,
    accumulation: int = 2,
) -> Any:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=rate)
    return deepspeed().initialize(
        model=model, optimizer=optimizer, config=config(stage, accumulation)
    )[0]
