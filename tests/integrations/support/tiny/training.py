"""Trainings of a few steps on tiny models and batches, and the gradients they should have, by
hand."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from pre_kernels.integrations import apply_pre, patch_trainer

from ..by_hand import copy_of, pre_loss, watch
from .models import batch, build

QUIET = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}


def one_image(words: int) -> Any:
    return [("text", 2), ("image", 8, 8), ("text", words)]


EQUAL = [one_image(5)] * 4
UNEQUAL_LABELS = [one_image(n) for n in (2, 9, 4, 6)]
UNEQUAL_IMAGES = [
    one_image(3),
    [("text", 4), ("image", 8, 8), ("text", 1), ("image", 8, 8), ("text", 8)],
    [("text", 7)],
    [("image", 8, 8), ("text", 4)],
]


class Samples(torch.utils.data.Dataset):
    """A data set of indices into `samples`; the collator makes the batch."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        return index


class InOrder(Trainer):
    """Takes the samples in order."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Recorder(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.steps.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )


def collate(family: str, samples: list[Any]) -> Any:
    def together(indices: list[int]) -> dict[str, torch.Tensor]:
        return merge(family, [batch(family, [samples[i]], seed=i).inputs for i in indices])

    return together


def merge(family: str, parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of several samples, padded on the right."""
    width = max(p["input_ids"].shape[1] for p in parts)
    whole: dict[str, torch.Tensor] = {}
    for name in {name for p in parts for name in p}:
        tensors = [p[name] for p in parts if name in p]
        if tensors[0].shape[:2] == (1, parts[0]["input_ids"].shape[1]) and name in (
            "input_ids",
            "attention_mask",
            "labels",
            "mm_token_type_ids",
        ):
            fill = -100 if name == "labels" else 0
            tensors = [
                torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill) for t in tensors
            ]
        whole[name] = torch.cat(tensors)
    return whole


def arguments(folder: Path, accumulation: int, size: int, **more: Any) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "remove_unused_columns": False,
        **QUIET,
    }
    return TrainingArguments(**(options | more))


def train(
    family: str,
    samples: list[Any],
    folder: Path,
    accumulation: int,
    patched: bool = False,
    trainer_class: type = InOrder,
    level: str = "patch",
    weighting: str = "token",
    **more: Any,
) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Train one step: (its gradients, the handle, the trainer)."""
    model = build(family)
    handle = apply_pre(model, level=level, weighting=weighting)
    recorder = Recorder()
    with patch_trainer() if patched else contextlib.nullcontext():
        trainer = trainer_class(
            model=model,
            args=arguments(folder, accumulation, len(samples) // accumulation, **more),
            train_dataset=Samples(samples),
            data_collator=collate(family, samples),
            callbacks=[recorder],
        )
        trainer.train()
    return recorder.steps[0], handle, trainer


def by_hand(
    family: str,
    samples: list[Any],
    handle: Any,
    weights: list[float],
    reduction: str,
    level: str = "patch",
    weighting: str = "token",
) -> dict[str, torch.Tensor]:
    """The head's gradient of 0.5 · Σ_i weights[i] · L_PRe(sample i), on a fresh model with a fresh
    head."""
    model = build(family)
    fresh = apply_pre(model, level=level)
    head = copy_of(fresh.head)
    fresh.remove()
    seen = watch(model, family)
    for index, (sample, weight) in enumerate(zip(samples, weights, strict=True)):
        data = batch(family, [sample], seed=index)
        model(**data.inputs)
        (
            0.5
            * weight
            * pre_loss(seen, data, [2], head, level, weighting=weighting, reduction=reduction)
        ).backward()
    return {f"pre_head.{n}": p.grad for n, p in head.items()} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_head(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    names = [n for n in wanted if n.startswith("pre_head")]
    assert len(names) == 4
    for name in names:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=2e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def labels_of(family: str, sample: Any, index: int) -> int:
    return int(batch(family, [sample], seed=index).inputs["labels"][..., 1:].ne(-100).sum())


def make(
    folder: Path, model: Any, trainer_class: type = InOrder, samples: Any = EQUAL, **more: Any
) -> Any:
    """A Trainer, patched or not, whose steps take all `samples` in two micro-batches."""
    callbacks = more.pop("callbacks", None)
    accumulation = more.pop("accumulation", 2)
    size = more.pop("size", len(samples) // accumulation)
    extra = {
        name: more.pop(name)
        for name in ("optimizers", "eval_dataset", "compute_loss_func", "model_init")
        if name in more
    }
    return trainer_class(
        model=model,
        args=arguments(folder, accumulation, size, **more),
        train_dataset=Samples(samples),
        data_collator=collate("llava", samples),
        callbacks=callbacks,
        **extra,
    )


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A `compute_loss_func`: the model's own loss, computed from its logits."""
    flat = outputs.logits[:, :-1].flatten(0, 1).float()
    return (
        torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum")
        / num_items_in_batch
    )


class Starts(TrainerCallback):
    """Keeps a copy of the head from the beginning of the training."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.w1 = model.pre_head.w1.detach().clone()
        self.step = state.global_step
