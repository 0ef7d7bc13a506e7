"""Transformers' own tensor parallelism (`tp_plan="auto"`), alone and with data parallelism: loss
and every gradient are those of one process with the whole model and the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pre_kernels.integrations import apply_pre

from .support.by_hand import assert_same_gradients, expected_gradients, gradients
from .support.processes import both, every
from .support.ranks import TEXT_ONLY, batches, by_hand, check, made
from .support.split_layers import column_row
from .support.tiny.models import batch, build


def saved(family: str, folder: Path) -> str:
    build(family).save_pretrained(folder)
    return str(folder)


def loaded(family: str, folder: str) -> Any:
    """The model in `folder`, split over all processes."""
    return type(build(family)).from_pretrained(folder, tp_plan="auto").train()


def whole(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients of the full parameters."""
    found = gradients(model).items()
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found}


def loop(family: str, folder: str, group: Any, head: str) -> Any:
    model = loaded(family, folder)
    weight = model.get_submodule("model.language_model.layers")[0].self_attn.q_proj.weight
    assert hasattr(weight, "full_tensor")
    torch.manual_seed(3)
    handle = apply_pre(model, group=group)
    loss = model(**batch(family).inputs).loss
    loss.backward()
    handle.save(f"{head}-{torch.distributed.get_rank()}")
    return loss.detach(), whole(model), handle.metrics()


@pytest.mark.parametrize(
    ("family", "group"),
    [("llava", None), ("llava", "world"), ("qwen2_5_vl", None), ("qwen2_5_vl", "world")],
)
def test_tp_plan(family: str, group: Any, tmp_path: Path) -> None:
    """All ranks have the same batch, so counting them together does not change the mean."""
    folder = saved(family, tmp_path / "model")
    ranks = both(loop, family, folder, group, str(tmp_path / "head"))
    model = build(family)
    torch.manual_seed(3)
    handle = apply_pre(model)
    head = handle.head
    handle.remove()
    data = batch(family)
    loss, wanted = expected_gradients(model, family, data, head, [2])
    for found, grads, metrics in ranks:
        torch.testing.assert_close(found, loss)
        assert_same_gradients(grads, wanted)
        assert metrics["pre_rows"] == int(data.visual.sum())
    # The head is whole on every rank, so rank 0 writes it.
    apply_pre(build(family)).load(tmp_path / "head-0")
    assert not os.path.exists(tmp_path / "head-1")


def on_four() -> Any:
    """Two data parallel ranks, each of two tensor parallel ones; gradients are averaged by hand."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replica = mesh.get_local_rank("dp")
    found = []
    for group in (mesh.get_group("dp"), "world"):
        model, _ = made(group=group)
        for layer in model.model.language_model.layers:
            parallelize_module(layer, mesh["tp"], column_row())
        losses = []
        for data in batches(TEXT_ONLY, replica):
            loss = model(**data.inputs).loss
            (loss / 2).backward()
            losses.append(loss.detach())
        grads = whole(model)
        for name, gradient in grads.items():
            total = torch.zeros_like(model.get_parameter(name)) if gradient is None else gradient
            total = total.full_tensor() if hasattr(total, "full_tensor") else total
            torch.distributed.all_reduce(total, group=mesh.get_group("dp"))
            grads[name] = total / 2
        found.append((losses, grads))
    return found


@pytest.mark.slow
def test_data_and_tensor_parallel() -> None:
    """The data parallel group and all ranks give the same mean: in all ranks each batch counts
    twice, and so does each rank."""
    ranks = every(4, on_four)
    for way in range(2):
        for one, other in ((0, 2), (1, 3)):
            check([ranks[one][way], ranks[other][way]], by_hand(TEXT_ONLY))
