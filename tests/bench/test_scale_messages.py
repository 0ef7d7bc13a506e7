"""The messages of docs/scale.md against those of real steps on several processes, each with PRe and
without it."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import scale_costs, scale_messages
from pre_kernels.integrations import apply_pre, patch_trainer
from tests.integrations.support.processes import both, every
from tests.integrations.support.ranks import (
    PLAIN,
    batches,
    config,
    deepspeed,
    need_deepspeed,
    steps,
)
from tests.integrations.support.tiny.models import build
from tests.integrations.support.tiny.training import EQUAL, InOrder, Samples, arguments, collate

KINDS = {"allreduce": "all-reduce", "allgather": "all-gather", "reduce_scatter": "reduce-scatter"}
# float32 weights and gradients; a head of widths 32 → 32 → 32
SIZES = scale_costs.Training(
    model=scale_costs.Model("tiny", 32, 4, 1, 1),
    tokens=1,
    visual=1,
    sequence=1,
    ranks=2,
    weight_bytes=4,
    gradient_bytes=4,
)


# The length of what a handle says about itself, once for each training. The text is longer.
HANDLES = {("all-gather", 8): 1}


class Sent(TorchDispatchMode):
    """Adds up the bytes of the whole tensors of collectives by kind in `large`, and counts those of
    fewer than 20 numbers by kind and bytes in `small`."""

    def __init__(self) -> None:
        super().__init__()
        self.large: Counter[str] = Counter()
        self.small: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if DTensor in types:
            return NotImplemented  # its collectives come here again
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._schema.name.split("::")[1].strip("_").replace("all_", "all")
            kind = next((k for k in KINDS if name.startswith(k)), None)
            if kind is not None:
                self._add(KINDS[kind], [*_tensors(args)])
        return result

    def _add(self, kind: str, tensors: list[torch.Tensor]) -> None:
        tensor = max(tensors, key=lambda t: t.nbytes)
        if tensor.numel() < 20:
            self.small[kind, tensor.nbytes] += 1
        elif tensor.is_floating_point():  # DDP's map of used parameters is of integers
            self.large[kind] += tensor.nbytes


def _tensors(values: Any) -> Any:
    for value in values:
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def model_of(heads: int, **options: Any) -> tuple[nn.Module, Any]:
    """A tiny LLaVA with so many heads; 0: without PRe. Nothing of the vision part trains."""
    model = build("llava")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    handle = None
    if heads:
        handle = apply_pre(model, layer=list(range(1, heads + 1)), group="world", **options)
    return model, handle


def of_ddp(heads: int) -> Any:
    model, _ = model_of(heads)
    wrapped = nn.parallel.DistributedDataParallel(model)
    return counted(wrapped, wrapped.no_sync)


def of_fsdp(heads: int, own: bool, loss: str, nodes: int = 0) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, handle = model_of(heads, **({"loss": loss} if heads else {}))
    count = torch.distributed.get_world_size()
    if nodes:
        mesh = init_device_mesh("cpu", (nodes, count // nodes), mesh_dim_names=("across", "inside"))
    else:
        mesh = init_device_mesh("cpu", (count,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    if heads and own:
        for head in model.pre_head:
            fully_shard(head, mesh=mesh)
    return counted(fully_shard(model, mesh=mesh), handle=handle)


def of_zero(heads: int, stage: int) -> Any:
    model, _ = model_of(heads)
    settings = config(stage)
    if stage == 3:
        # Parameters are released after each use, as those of a large model are.
        names = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        settings["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    ours = deepspeed().initialize(model=model, optimizer=optimizer, config=settings)[0]
    with Sent() as sent:
        for data in batches([[PLAIN, PLAIN]] * 2, torch.distributed.get_rank()):
            ours.backward(ours(**data.inputs).loss)
            ours.step()
    return sent.large, sent.small


def counted(model: nn.Module, no_sync: Any = None, handle: Any = None) -> Any:
    """What two micro-batches and an optimizer step send."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if handle is not None:
        handle.watch(optimizer)
    samples = [[PLAIN, PLAIN]] * torch.distributed.get_world_size()
    with Sent() as sent:
        steps(model, samples, no_sync)
        optimizer.step()
    return sent.large, sent.small


def compare(with_pre: Any, without: Any, sizes: scale_costs.Training) -> Counter[tuple[str, int]]:
    """Compare what PRe adds with the formula. Returns the small messages that it adds."""
    for (large, _), (plain, _) in zip(with_pre, without, strict=True):
        wanted: Counter[str] = Counter()
        for message in scale_messages.of_heads(sizes):
            wanted[message.name] += int(message.calls * message.size)
        assert large - plain == wanted
        assert not plain - large
    return with_pre[0][1] - without[0][1]


def group_alone(heads: int) -> Counter[tuple[str, int]]:
    """The small messages of two forwards with `group`, of which the first compares the handles."""
    return Counter({("all-reduce", scale_messages.small(heads)[2].size): 2} | HANDLES)


def sizes_of(strategy: str, heads: int, **more: Any) -> scale_costs.Training:
    return replace(SIZES, strategy=strategy, heads=heads, micro_batches=2, **more)


@pytest.mark.parametrize("heads", [1, 3])
def test_ddp(heads: int) -> None:
    added = compare(both(of_ddp, heads), both(of_ddp, 0), sizes_of("ddp", heads))
    assert added == group_alone(heads)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
@pytest.mark.parametrize("own", [False, True], ids=["under the root", "a group of its own"])
def test_fsdp(own: bool, loss: str) -> None:
    sizes = sizes_of("fsdp", 2, own_group=own, loss=loss)
    added = compare(both(of_fsdp, 2, own, loss), both(of_fsdp, 0, own, loss), sizes)
    assert added == group_alone(2)


@pytest.mark.slow
def test_hsdp() -> None:
    """Two nodes of two processes."""
    sizes = sizes_of("hsdp", 2, ranks=4, node=2)
    arguments = (False, "cosine", 2)
    compare(every(4, of_fsdp, 2, *arguments), every(4, of_fsdp, 0, *arguments), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(stage: int) -> None:
    need_deepspeed()
    sizes = sizes_of(f"zero{stage}", 1)
    added = compare(both(of_zero, 1, stage), both(of_zero, 0, stage), sizes)
    assert added == group_alone(1)


def of_trainer(folder: str, heads: int) -> Any:
    """What two optimizer steps of two micro-batches each send, with a log after each."""
    model = build("llava")
    if heads:
        apply_pre(model, layer=list(range(1, heads + 1)))
    options = {"max_steps": 2, "ddp_backend": "gloo", "ddp_find_unused_parameters": True}
    with Sent() as sent, patch_trainer() if heads else contextlib.nullcontext():
        InOrder(
            model=model,
            args=arguments(Path(folder), 2, 1, **options),
            train_dataset=Samples(EQUAL),
            data_collator=collate("llava", EQUAL),
        ).train()
    return sent.large, sent.small


@pytest.mark.parametrize("heads", [1, 2])
def test_the_trainer_counts_by_one_message_for_each_step(heads: int, tmp_path: Path) -> None:
    """However many layers are read, and however many micro-batches a step has."""
    wanted = both(of_trainer, str(tmp_path / "with"), heads)
    plain = both(of_trainer, str(tmp_path / "without"), 0)
    counted, logged, *_ = scale_messages.small(heads)
    assert (
        wanted[0][1] - plain[0][1]
        == {
            ("all-reduce", counted.size): 2,
            ("all-reduce", logged.size): 2,
        }
        | HANDLES
    )
    added = wanted[0][0] - plain[0][0]
    assert added == {"all-reduce": 2 * heads * SIZES.head_parameters * 4}
