"""One training that saves and resumes, with each way of splitting it over two processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from pre_kernels.integrations import apply_pre, patch_trainer

from .ranks import config, deepspeed
from .tiny.models import build
from .tiny.training import EQUAL, InOrder, Samples, Starts, arguments, collate


def trained(
    folder: str,
    steps: int,
    resume: str | None,
    samples: Any = EQUAL,
    callbacks: Sequence[Any] = (),
    **more: Any,
) -> Any:
    """Train, saving after each of `steps` and at the end. Returns the head's `w1` from the
    beginning."""
    model = build("llava")
    starts = Starts()
    # The last layer of the tower gets no gradient, so FSDP's optimizer states lack it.
    model.model.vision_tower.requires_grad_(False)
    torch.manual_seed(99 if resume else 3)
    apply_pre(model)
    options = {
        "per_device_train_batch_size": 1,
        "ddp_find_unused_parameters": True,
        "save_steps": 1,
    }
    options |= {"save_strategy": "steps", "max_steps": steps, "max_grad_norm": 1.0} | more
    accumulation = options.pop("gradient_accumulation_steps", 1)
    args = arguments(Path(folder), accumulation, 1, **options)
    if "fsdp" in options:
        # Reading `device` also sets accelerate up.
        assert args.device.type == "cpu"
        # accelerate does not shard on CPUs, so it is told that this is not one.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        # FSDP1 does not accept "cpu:0".
        PartialState._shared_state["device"] = torch.device("cpu")
    with patch_trainer(), warnings.catch_warnings():
        # However the parameters are split, a correct training gets no warning.
        warnings.filterwarnings("error", message="PRe: ")
        trainer = InOrder(
            model=model,
            args=args,
            train_dataset=Samples(samples),
            data_collator=collate("llava", samples),
            callbacks=[starts, *callbacks],
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(f"{folder}/last")
    return starts.w1


def zero(stage: int, half: bool, folder: str, steps: int, resume: str | None, **more: Any) -> None:
    deepspeed()
    settings = config(stage, 1, gradient_clipping=1.0)
    options: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.01, **more}
    if half:
        settings["bf16"] = {"enabled": True}
        options["bf16"] = True
    trained(folder, steps, resume, deepspeed=settings, **options)


def ddp_resumes(folder: str, steps: int, resume: str | None, **more: Any) -> Any:
    return trained(folder, steps, resume, ddp_backend="gloo", **more)


def fsdp(
    version: int,
    kind: str,
    half: bool,
    folder: str,
    steps: int,
    resume: str | None,
    **more: Any,
) -> Any:
    plugin: dict[str, Any] = {
        "version": version,
        "use_orig_params": True,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": kind,
    }
    # Both of these settings need an accelerator.
    plugin |= {
        "sync_module_states": False,
        "cpu_ram_efficient_loading": False,
    }
    # `accelerate launch` sets these variables, and transformers 4 reads them.
    os.environ |= {"FSDP_VERSION": str(version), "FSDP_STATE_DICT_TYPE": kind}
    options = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": plugin,
        "max_grad_norm": 0.0,
        "ddp_backend": "gloo",
        "bf16": half,
    }
    # accelerate does not load the optimizer's state from shards of FSDP1, and SGD has no state.
    options |= {"optim": "adamw_torch" if version == 2 else "sgd", "learning_rate": 0.01}
    w1: Any = trained(folder, steps, resume, **options, **more)
    # Each process has only its own elements.
    if version == 1:
        parts: list[Any] = [None, None]
        torch.distributed.all_gather_object(parts, w1.flatten())
        return torch.cat(parts).view(32, 32)
    assert w1.to_local().shape == (32 // torch.distributed.get_world_size(), 32)
    return w1.full_tensor()


RUNS = {
    "DDP": (ddp_resumes,),
    # The full state dict crashes on CPUs, in torch.
    "FSDP1": (fsdp, 1, "SHARDED_STATE_DICT", False),
    "FSDP2": (fsdp, 2, "FULL_STATE_DICT", False),
    "FSDP2, sharded": (fsdp, 2, "SHARDED_STATE_DICT", False),
    "ZeRO-2": (zero, 2, False),
    "ZeRO-3": (zero, 3, False),
    "FSDP2, bfloat16": (fsdp, 2, "FULL_STATE_DICT", True),
    "ZeRO-2, bfloat16": (zero, 2, True),
    "ZeRO-3, bfloat16": (zero, 3, True),
}
