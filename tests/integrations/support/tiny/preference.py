"""TRL's preference and RL trainers on a tiny LLaVA: real images, real conversations, and a reward
for length."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image

from pre_kernels.integrations import apply_pre, patch_trainer

from ..by_hand import copy_of, pre_loss, watch
from .models import IMAGE, Batch, build
from .training import QUIET, Recorder
from .trl import processor

# The number of images in each prompt, chosen so that no two halves have equal sums.
ROWS = [1, 2, 4, 7]


def said(role: str, first: int, words: int) -> list[dict[str, str]]:
    return [{"role": role, "content": " ".join(f"w{first + i}" for i in range(words))}]


def rows(kind: str) -> Dataset:
    """One prompt for each number of images, with the other columns that the trainer needs."""
    generator = np.random.default_rng(0)
    conversations: list[dict[str, Any]] = []
    for index, count in enumerate(ROWS):
        pixels = generator.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
        row = {"images": [Image.fromarray(image) for image in pixels], "prompt": said("user", 4, 3)}
        if kind == "DPO":
            row |= {
                "chosen": said("assistant", 10 + index, 2 + index),
                "rejected": said("assistant", 20, 3),
            }
        elif kind == "KTO":
            row |= {"completion": said("assistant", 10 + index, 2 + index), "label": index % 2 == 0}
        conversations.append(row)
    return Dataset.from_list(conversations)


def length(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(str(completion)))) for completion in completions]


class Forwards:
    """The arguments of a model's training forwards."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            names = ("input_ids", "attention_mask", "pixel_values")
            self.seen.append({name: kwargs[name].clone() for name in names})


def trl(kind: str) -> tuple[Any, Any]:
    """The trainer and its config. Skips if this TRL has none for images."""
    module = pytest.importorskip(f"trl.trainer.{kind.lower()}_trainer")
    if "images" not in Path(module.__file__).read_text(encoding="utf-8"):
        pytest.skip(f"this TRL's {kind}Trainer takes no images")
    found = importlib.import_module("trl")
    return getattr(found, f"{kind}Trainer"), getattr(found, f"{kind}Config")


def train(
    kind: str, folder: Path, attached: bool = True, lora: bool = False, **more: Any
) -> tuple[Any, Any, Any, list[Any], list[str]]:
    """A step of 4 rows: (gradients, the handle or None, the trainer, the arguments of its forwards,
    PRe's warnings)."""
    trainer_class, config = trl(kind)
    model = build("llava")
    if lora:
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=r".*language_model.*\.[qv]_proj")
        )
    handle = apply_pre(model) if attached else None
    recorder = Recorder()
    forwards = Forwards(model)
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 0.0,  # the head keeps its values
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        **QUIET,
    }
    trainer_arguments: dict[str, Any] = {
        "args": None,
        "train_dataset": rows(kind),
        "processing_class": processor(),
    }
    if kind in ("DPO", "KTO"):
        options["max_length"] = None
        trainer_arguments["ref_model"] = None if lora else build("llava", seed=1).eval()
    else:
        options |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.0}
        # Rows are shuffled, so each forward gets only one row.
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        trainer_arguments["reward_funcs"] = length
    trainer_arguments["args"] = config(**(options | more))
    with (
        warnings.catch_warnings(record=True) as caught,
        patch_trainer() if attached else contextlib.nullcontext(),
    ):
        warnings.simplefilter("always")
        trainer = trainer_class(model=model, callbacks=[recorder], **trainer_arguments)
        trainer.train()
    told = [str(w.message) for w in caught if str(w.message).startswith("PRe: ")]
    return recorder.steps[0], handle, trainer, forwards.seen, told


def auxiliary(
    forwards: list[dict[str, torch.Tensor]], like: torch.nn.Module, ahead: bool
) -> dict[str, torch.Tensor]:
    """The gradients of 0.5 · L_PRe on a fresh model with this head.

    With `ahead` L_PRe is the mean over the visual tokens of all forwards, otherwise the mean of the
    forwards' own means.
    """
    model = build("llava")
    head = copy_of(like)
    seen = watch(model, "llava")
    tokens = [int((inputs["input_ids"] == IMAGE).sum()) for inputs in forwards]
    for inputs, own in zip(forwards, tokens, strict=True):
        model(**inputs)
        visual = Batch(inputs, inputs["input_ids"] == IMAGE)
        divisor = sum(tokens) if ahead else own * len(forwards)
        (0.5 / divisor * pre_loss(seen, visual, [2], head, reduction="sum")).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads | {f"pre_head.{name}": p.grad for name, p in head.items()}
