"""LLaVA's two stages through `transformers.Trainer`."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import (
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from .scenes import Scenes
from .settings import Settings
from .stages import Advance
from .text import visual_batch


def train_stage(
    model: LlavaForConditionalGeneration,
    scenes: Scenes,
    trained: tuple[str, ...],
    steps: int,
    rate: float,
    settings: Settings,
    seed: int,
    advance: Advance,
) -> list[dict[str, float]]:
    """Train the parameters whose name contains one of `trained`, and return what the Trainer
    logged.

    This function does not know PRe: a handle on the model adds its loss inside the model's forward.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=settings.tune_batch,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, steps // 4 + 1),
            weight_decay=0.0,
            adam_beta2=0.95,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=model.device.type == "cpu",
            seed=seed,
        )
        if arguments.n_gpu > 1:
            # nn.DataParallel would not gain anything at this size.
            arguments._n_gpu = 1
        numbers: Any = list(range(len(scenes)))
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=numbers,
            data_collator=lambda batch: visual_batch(scenes, torch.tensor(batch)),
            callbacks=[AdvanceCallback(advance)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.requires_grad_(True)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class AdvanceCallback(TrainerCallback):
    """Move a progress bar on."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.loss = float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = logs.get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(self.loss)
