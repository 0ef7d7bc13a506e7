"""Shared by tests on several processes: samples for each rank, the model, its loss and gradients by
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


def batches(samples: list[Any], rank: int, half: bool = False) -> list[Batch]:
    """The batches of a rank, with the pixels in bfloat16 if `half`."""
    found = []
    for number, sample in enumerate(samples[rank]):
        data = batch("llava", [sample], seed=len(samples) * number + rank)
        if sample is MASKED or sample == MASKED:
            data.inputs["attention_mask"][0, :5] = 0
            data.visual[:] = False
            data.lengths.clear()
        if half and "pixel_values" in data.inputs:
            data.inputs["pixel_values"] = data.inputs["pixel_values"].bfloat16()
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
        data = [batches(samples, rank)[number] for rank in range(len(samples))]
        counts = [len(d.lengths) if level == "image" else int(d.visual.sum()) for d in data]
        total = torch.zeros(())
        for d, count in zip(data, counts, strict=True):
            loss = model(**d.inputs).loss / len(samples)
            divisor = max(sum(counts), 1) if group else len(samples) * max(count, 1)
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
    """(losses, gradients) of all ranks."""
    for *losses, loss in zip(*(rank[0] for rank in ranks), wanted[0], strict=True):
        torch.testing.assert_close(torch.stack(losses).mean(), loss)
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


def shard(model: nn.Module, own: bool, **options: Any) -> nn.Module:
    """FSDP2 with these options around every layer, around the head if it is to be a group of its
    `own`, and around the model."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.language_model.layers:
        fully_shard(layer, **options)
    if own:
        for head in (
            model.pre_head if isinstance(model.pre_head, nn.ModuleList) else [model.pre_head]
        ):
            fully_shard(head, **options)
    return fully_shard(model, **options)


def fully_sharded(model: nn.Module, own: bool, **options: Any) -> nn.Module:
    """FSDP1 with these options around the same modules."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from pre_kernels import PreHead

    policy = ModuleWrapPolicy(
        {type(model.model.language_model.layers[0]), *([PreHead] if own else [])}
    )
    options = {"use_orig_params": True, "device_id": torch.device("cpu")} | options
    return FSDP(model, auto_wrap_policy=policy, **options)


def whole_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Every gradient by parameter name, of a model that FSDP2 or FSDP1 has split."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    if not isinstance(model, FSDP):
        found = {n: p.grad for n, p in model.named_parameters()}
        return {n: None if g is None else g.full_tensor() for n, g in found.items()}
    with FSDP.summon_full_params(model, with_grads=True):
        return {n.replace("_fsdp_wrapped_module.", ""): g for n, g in gradients(model).items()}


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
    **more: Any,
) -> Any:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=rate)
    return deepspeed().initialize(
        model=model, optimizer=optimizer, config=config(stage, accumulation, **more)
    )[0]


def zero_steps(model: nn.Module, samples: list[Any], stage: int, **more: Any) -> Any:
    """The losses and the gradients of a step under ZeRO, with `more` in DeepSpeed's config."""
    ds = engine(model, stage, accumulation=len(samples[0]), **more)
    head = model.pre_head
    whole = {n: p.shape for n, p in head.named_parameters()}
    inside = []
    head.register_forward_pre_hook(
        lambda *_: inside.append({n: p.shape for n, p in head.named_parameters()})
    )
    from deepspeed.utils import safe_get_full_grad

    losses = []
    grads = {}
    for d in batches(samples, torch.distributed.get_rank(), half="bf16" in more):
        loss = ds(**d.inputs).loss
        losses.append(loss.detach())
        ds.backward(loss)
        if ds.is_gradient_accumulation_boundary():
            grads = {n: safe_get_full_grad(p) for n, p in model.named_parameters()}
            grads = {n: None if g is None else g.clone() for n, g in grads.items()}
        ds.step()
    if stage == 3:
        assert set(whole.values()) == {(0,)} == {p.shape for p in head.parameters()}
        assert [i["w1"] for i in inside] == [(32, 32)] * len(inside)
    return losses, grads
