"""transformers.Trainer in two processes: DDP, DeepSpeed; the head in every checkpoint, and
resume."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from pre_kernels import PreHead
from pre_kernels.integrations import apply_pre, patch_trainer

from .support.ranks import config, deepspeed, need_deepspeed
from .support.tiny.models import batch, build
from .support.tiny.training import (
    EQUAL,
    UNEQUAL_IMAGES,
    InOrder,
    Samples,
    arguments,
    assert_head,
    by_hand,
    collate,
    train,
)
from .support.two_ranks import both
from .test_head_training import own_loss
from .test_resume import Starts

WEIGHTS = "pre_head.safetensors"


class LossFunc(InOrder):
    def __init__(self, **options: Any) -> None:
        super().__init__(compute_loss_func=own_loss, **options)


def ddp(family: str, folder: str, trainer_class: type = InOrder, **options: Any) -> Any:
    """The Trainer's default is to find unused parameters."""
    options |= {"per_device_train_batch_size": 1, "ddp_backend": "gloo"}
    found, _, trainer = train(
        family, UNEQUAL_IMAGES, Path(folder), 2, True, trainer_class, **options
    )
    assert trainer.model_wrapped.find_unused_parameters
    return found


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llava", "its own"),
        ("llava", "label_smoothing_factor"),
        ("llava", "compute_loss_func"),
        ("qwen2_5_vl", "its own"),
    ],
)
def test_ddp(family: str, how: str, tmp_path: Path) -> None:
    """The step's tokens are counted over both processes, one of which has a micro-batch without
    images.

    Also where the model is not given the labels, so that its output has no loss.
    """
    tokens = sum(int(batch(family, [s]).visual.sum()) for s in UNEQUAL_IMAGES)
    wanted = by_hand(family, UNEQUAL_IMAGES, apply_pre(build(family)), [1 / tokens] * 4, "sum")
    trainer_class = LossFunc if how == "compute_loss_func" else InOrder
    more = {how: 0.1} if how == "label_smoothing_factor" else {}
    for found in both(ddp, family, str(tmp_path), trainer_class, timeout=60, **more):
        assert_head(found, wanted)


def trained(folder: str, steps: int, resume: str | None, **more: Any) -> Any:
    """Saves after each of `steps` and at the end; returns the head's `w1` at the beginning."""
    model, starts = build("llava"), Starts()
    model.model.vision_tower.requires_grad_(
        False
    )  # its last layer is not used, which FSDP's optimizer states miss
    torch.manual_seed(99 if resume else 3)
    apply_pre(model)
    options = {
        "per_device_train_batch_size": 1,
        "ddp_find_unused_parameters": True,
        "save_steps": 1,
    }
    options |= {"save_strategy": "steps", "max_steps": steps, "max_grad_norm": 1.0} | more
    args = arguments(Path(folder), 1, 1, **options)
    if "fsdp" in options:
        assert args.device.type == "cpu"  # which also sets accelerate up
        PartialState._shared_state["distributed_type"] = (
            DistributedType.MULTI_XPU
        )  # it does not shard on CPUs
        PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 does not take "cpu:0"
    with patch_trainer(), warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message="PRe: "
        )  # nothing is wrong, whatever splits the parameters
        trainer = InOrder(
            model=model,
            args=args,
            train_dataset=Samples(EQUAL),
            data_collator=collate("llava", EQUAL),
            callbacks=[starts],
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(f"{folder}/last")
    return starts.w1


def zero(stage: int, folder: str, steps: int, resume: str | None) -> None:
    deepspeed()
    settings = config(stage, 1, gradient_clipping=1.0)
    trained(folder, steps, resume, optim="adamw_torch", learning_rate=0.01, deepspeed=settings)


def ddp_resumes(folder: str, steps: int, resume: str | None) -> Any:
    return trained(folder, steps, resume, ddp_backend="gloo")


def fsdp(version: int, kind: str, folder: str, steps: int, resume: str | None) -> Any:
    plugin: dict[str, Any] = {
        "version": version,
        "use_orig_params": True,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": kind,
    }
    plugin |= {
        "sync_module_states": False,
        "cpu_ram_efficient_loading": False,
    }  # which look for an accelerator
    # as `accelerate launch` says it, which is the way of transformers 4
    os.environ |= {"FSDP_VERSION": str(version), "FSDP_STATE_DICT_TYPE": kind}
    options = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": plugin,
        "max_grad_norm": 0.0,
        "ddp_backend": "gloo",
    }
    # accelerate does not load the state of an optimizer in shards of FSDP1, and SGD has none
    options |= {"optim": "adamw_torch" if version == 2 else "sgd", "learning_rate": 0.01}
    w1: Any = trained(folder, steps, resume, **options)
    if version == 1:  # each has those of the elements that fell to it
        parts: list[Any] = [None, None]
        torch.distributed.all_gather_object(parts, w1.flatten())
        return torch.cat(parts).view(32, 32)
    assert w1.to_local().shape == (16, 32)
    return w1.full_tensor()


def heads(folder: Path, *names: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / name / WEIGHTS) for name in names]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(t, second[n]) for n, t in first.items()
    )


RUNS = {
    "DDP": (ddp_resumes,),
    "FSDP1": (fsdp, 1, "SHARDED_STATE_DICT"),  # the whole one crashes on CPUs, in torch
    "FSDP2": (fsdp, 2, "FULL_STATE_DICT"),
    "FSDP2, sharded": (fsdp, 2, "SHARDED_STATE_DICT"),
    "ZeRO-2": (zero, 2),
    "ZeRO-3": (zero, 3),
}


@pytest.mark.parametrize("how", RUNS)
def test_head_beside_every_checkpoint(how: str, tmp_path: Path) -> None:
    """It loads in one process, and training goes on from it."""
    if "ZeRO" in how:
        need_deepspeed()
    run = RUNS[how]
    both(*run, str(tmp_path / "a"), 2, None)
    one, two, last = heads(tmp_path / "a", "checkpoint-1", "checkpoint-2", "last")
    assert not same(one, two)
    assert same(two, last)
    model = build("llava")
    handle = apply_pre(model)
    handle.load(tmp_path / "a" / "checkpoint-1")
    assert isinstance(handle.head, PreHead)
    assert same(one, {n: p.detach() for n, p in handle.head.named_parameters()})

    resumed = both(*run, str(tmp_path / "b"), 2, str(tmp_path / "a" / "checkpoint-1"))
    if "ZeRO" not in how:
        assert all(torch.equal(w1, one["w1"]) for w1 in resumed)
    if how == "DDP":  # transformers 5 does not restore all of this model, so the next step differs
        alone = trained(str(tmp_path / "c"), 2, str(tmp_path / "a" / "checkpoint-1"))
        assert torch.equal(alone, one["w1"])
    else:  # ends with the very head that training without a stop has
        assert same(*heads(tmp_path / "a", "last"), *heads(tmp_path / "b", "last"))
