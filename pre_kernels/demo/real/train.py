"""LLaVA's two stages through `transformers.Trainer`, resumable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from ..stages import Advance
from ..train import StepCallback
from .settings import Settings
from .text import Batches

# A training that was stopped loses at most so many steps.
SAVED_EVERY = 60


def train_stage(
    model: Any,
    batches: Batches,
    steps: int,
    rate: float,
    settings: Settings,
    seed: int,
    folder: Path,
    advance: Advance,
    watch: Callable[[Trainer], TrainerCallback] | None = None,
) -> list[dict[str, Any]]:
    """Train the parameters that require a gradient, and return what the Trainer logged. Checkpoints
    are in `folder`; if there are any, resume from the last.

    This function does not know PRe: `apply_pre` and `patch_trainer` add its loss.

    Args:
        watch: makes one more callback for the Trainer.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(settings.warmup, steps // 4 + 1),
        weight_decay=0.0,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_steps=SAVED_EVERY,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=model.device.type == "cpu",
        bf16=settings.bf16,
        seed=seed,
    )
    numbers: Any = range(steps * settings.batch)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=numbers,
        data_collator=batches,
        callbacks=[StepCallback(advance)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if watch is not None:
        trainer.add_callback(watch(trainer))
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    history: list[dict[str, Any]] = trainer.state.log_history
    return history
