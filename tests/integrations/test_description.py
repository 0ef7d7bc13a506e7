"""`print(handle)` says what PRe does, whatever state it is in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pre_kernels.integrations import apply_pre

from .support.tiny.models import build

HEAD = "head 32 -> 32 -> 32, gelu, float32"


def test_the_settings() -> None:
    handle = apply_pre(build("llava").train(), layer=2)
    assert str(handle).splitlines() == [
        "PreHandle(on: LlavaForConditionalGeneration",
        "  layer 2 of 4, weight 0.5",
        "  loss cosine, anchor pre_llm, level patch",
        f"  {HEAD})",
    ]


def dino(inputs: Any, rows: Any) -> Any: ...


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ({"layer": [1, 3]}, ["layers 1, 3 of 4"]),
        ({"weight": 1e-3, "loss": "mse"}, ["weight 0.001", "loss mse"]),
        ({"anchor": dino, "anchor_dim": 8}, ["anchor dino", "head 32 -> 32 -> 8"]),
        ({"level": "image", "fraction": 0.5}, ["level image, fraction 0.5"]),
        ({"weighting": "image", "nonfinite": "skip"}, ["weighting image, nonfinite skip"]),
        ({"labels": None}, ["level patch, added by handle.loss()"]),
        ({"schedule": "cosine"}, ["weight 0.5, cosine (0.5 at progress 0)"]),
        ({"warmup": 0.1}, ["weight 0.5, constant after a warmup of 0.1 (0 at progress 0)"]),
        ({"activation": "relu", "hidden_dim": 8}, ["head 32 -> 8 -> 32, relu, float32"]),
        ({"depth": 1, "hidden_dim": 8}, ["head 32 -> 32, gelu, float32"]),
        (
            {"depth": 3, "hidden_dim": 8, "norm": "rms", "loss": "gram", "gram_over": "batch"},
            ["loss gram over the batch,", "head rms norm, 32 -> 8 -> 8 -> 32, gelu"],
        ),
    ],
    ids=" ".join,
)
def test_options_that_are_not_the_default(arguments: dict[str, Any], lines: list[str]) -> None:
    said = repr(apply_pre(build("llava"), **arguments))
    assert all(line in said for line in lines), said
    assert said.isascii()
    assert said.count("head ") == 1


STATES: dict[str, Callable[[Any], Any]] = {
    "off (enabled is False)": lambda handle: setattr(handle, "enabled", False),
    "off (weight is 0)": lambda handle: setattr(handle, "weight", 0),
    "on (but the model is in eval mode)": lambda handle: handle.model.eval(),
    "removed": lambda handle: handle.remove(),
}


@pytest.mark.parametrize("state", STATES)
def test_the_state(state: str) -> None:
    handle = apply_pre(build("llava").train())
    STATES[state](handle)
    said = str(handle)
    assert said.startswith(f"PreHandle({state}: LlavaFor")
    assert ("head" in said) is (state != "removed")
    assert "layer 2 of 4, weight" in said


def test_a_removed_handle_whose_model_has_another() -> None:
    model = build("llava").train()
    handle = apply_pre(model)
    handle.remove()
    apply_pre(model, layer=3)
    assert str(handle).startswith("PreHandle(removed")
    assert "head" not in str(handle)


def test_the_head_is_gone() -> None:
    handle = apply_pre(build("llava").train())
    del handle.model.pre_head
    assert "layer 2 of 4" in str(handle)


def test_the_schedule_moves() -> None:
    handle = apply_pre(build("llava"), schedule="cosine")
    handle.progress = 0.75
    assert "weight 0.5, cosine (0.0732 at progress 0.75)" in str(handle)


def test_peft_keeps_one_line_for_a_head_and_its_copy() -> None:
    peft = pytest.importorskip("peft")
    model = build("llava").train()
    handle = apply_pre(model)
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["pre_head"])
    peft.get_peft_model(model, lora)
    assert str(handle).count(HEAD) == 1


def test_a_deep_copy_and_a_head_on_another_device() -> None:
    handle = apply_pre(build("llava").train())
    handle.model.to("meta")  # its values cannot be read
    assert HEAD in str(copy.deepcopy(handle))


def test_under_ddp_and_fsdp(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        handle = apply_pre(build("llava").train())
        said = str(handle)
        ddp = torch.nn.parallel.DistributedDataParallel(handle.model)
        assert str(handle) == said
        del ddp
        fully_shard(handle.model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert str(handle) == said.replace("Llava", "FSDPLlava")
    finally:
        torch.distributed.destroy_process_group()
