"""One training in a loop of its own that any number of ranks can resume under any strategy, with
checkpoints by torch.distributed.checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from pre_kernels.integrations import apply_pre

from .by_hand import copy_of, gradients, pre_loss, watch
from .ranks import PLAIN, TWO_IMAGES, engine, fully_sharded, shard
from .tiny.models import IMAGE, Batch, batch, build
from .tiny.training import merge, one_image

# The samples of each step. However they are split over two or four ranks, the ranks have different
# numbers of visual tokens.
STEPS = [
    [TWO_IMAGES, PLAIN, PLAIN, one_image(4)],
    [PLAIN, one_image(6), TWO_IMAGES, PLAIN],
    [PLAIN, TWO_IMAGES, TWO_IMAGES, TWO_IMAGES],
]
RATE = 0.01
FULL = StateDictOptions(full_state_dict=True)


def part(step: int, rank: int, count: int) -> Batch:
    """The batch of one of `count` ranks."""
    inputs = [
        batch("llava", [sample], seed=10 * step + place).inputs
        for place, sample in enumerate(STEPS[step])
        if place % count == rank
    ]
    merged = merge("llava", inputs)
    return Batch(merged, merged["input_ids"] == IMAGE)


def world() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class Training:
    """A model with a head, wrapped as `how` says, and its optimizer.

    A resumed one starts from a different seed, so everything that is equal later was loaded.
    `weights` is a file with the model's state dict.
    """

    def __init__(
        self, how: str, resumes: bool = False, weights: str | None = None, **options: Any
    ) -> None:
        self.how = how
        self.model = build("llava", seed=7 if resumes else 0)
        # Its last layer gets no gradient, so an optimizer would have no state of it.
        self.model.model.vision_tower.requires_grad_(False)
        torch.manual_seed(99 if resumes else 3)
        if weights is not None:
            self.model.load_state_dict(torch.load(weights))
        self.handle = apply_pre(self.model, group="world", **options)
        self.wrapped: Any = self.model
        if how.startswith("zero"):
            self.engine = self.wrapped = engine(
                self.model, int(how[-1]), torch.optim.AdamW, RATE, accumulation=1
            )
            return
        if how == "ddp":
            self.wrapped = nn.parallel.DistributedDataParallel(
                self.model, find_unused_parameters=True
            )
        elif how.startswith("fsdp2"):
            shard(self.model, "own" in how)
        elif how == "hsdp":
            # Two replicas, each over half of the ranks.
            mesh = init_device_mesh("cpu", (2, world()[1] // 2), mesh_dim_names=("pair", "shard"))
            shard(self.model, False, mesh=mesh)
        elif how == "fsdp1":
            self.wrapped = fully_sharded(self.model, True)
        head = {id(p) for p in self.handle.head.parameters()}
        others = [p for p in self.wrapped.parameters() if p.requires_grad and id(p) not in head]
        groups = [{"params": others}, *self.handle.param_groups()]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE)

    def backward(self, step: int) -> Tensor:
        """The loss of this rank's part of the step, after its backward."""
        loss = self.wrapped(**part(step, *world()).inputs).loss
        if self.how.startswith("zero"):
            self.engine.backward(loss)
        else:
            loss.backward()
        return loss.detach()

    def step(self, step: int) -> None:
        """An optimizer step."""
        self.backward(step)
        if self.how.startswith("zero"):
            self.engine.step()
            return
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: str) -> None:
        model, optimizer = get_state_dict(self.wrapped, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: str) -> None:
        model, optimizer = get_state_dict(self.wrapped, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(
            self.wrapped, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )

    def full(self) -> dict[str, Tensor]:
        """The whole model, and of the optimizer's state all but its settings."""
        return whole(self.wrapped, self.optimizer)

    def gradients(self) -> dict[str, Tensor | None]:
        """The whole gradients of the parameters that are trained."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if self.how.startswith("zero"):
            from deepspeed.utils import safe_get_full_grad

            return {name: safe_get_full_grad(p).clone() for name, p in trained.items()}
        return {
            name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in trained.items()
        }


def whole(model: nn.Module, optimizer: Any = None) -> dict[str, Tensor]:
    """The whole tensors of the model, and of the optimizer's state."""
    if optimizer is None:
        return {n: t.clone() for n, t in get_model_state_dict(model, options=FULL).items()}
    state, moments = get_state_dict(model, optimizer, options=FULL)
    found = {name: tensor.clone() for name, tensor in state.items()}
    for name, values in moments["state"].items():
        found |= {f"{name}/{kind}": value.clone() for kind, value in values.items()}
    return found


def by_hand(
    state: dict[str, Tensor], step: int, count: int
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The mean loss over `count` ranks and the gradients of a step, on one process from the model
    and head in `state`."""
    model = build("llava")
    model.model.vision_tower.requires_grad_(False)
    handle = apply_pre(model)
    model.load_state_dict({n: t for n, t in state.items() if "/" not in n})
    head = copy_of(handle.head)
    handle.remove()
    seen = watch(model, "llava")
    parts = [part(step, rank, count) for rank in range(count)]
    terms = sum(int(data.visual.sum()) for data in parts)
    total = torch.zeros(())
    for data in parts:
        loss = model(**data.inputs).loss / count
        loss = loss + 0.5 * pre_loss(seen, data, [2], head, reduction="sum") / terms
        loss.backward()
        total += loss.detach()
    wanted = {n: g for n, g in gradients(model).items() if "vision_tower" not in n}
    return total, wanted | {f"pre_head.{n}": p.grad for n, p in head.items()}
