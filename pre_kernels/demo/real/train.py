"""LLaVA's two stages through `transformers.Trainer`, resumable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..stages import Advance
from ..train import AdvanceCallback
from .settings import Settings
from .text import Batches
from .work import TRAINED, Weights, last_checkpoint

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
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=model.device.type == "cpu",
        bf16=settings.bf16,
        seed=seed,
    )
    if model.device.type == "cuda":
        # The Trainer would split each batch over all GPUs.
        arguments._n_gpu = 1
    numbers: Any = range(steps * settings.batch)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=numbers,
        data_collator=batches,
        callbacks=[AdvanceCallback(advance)],
    )
    trainer.add_callback(Weights(folder))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if watch is not None:
        trainer.add_callback(watch(trainer))
    last = last_checkpoint(folder)
    if last is not None:
        # load_state_dict leaves out what has no name here, and the head, which PRe loads.
        model.load_state_dict(load_file(last / TRAINED), strict=False)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    history: list[dict[str, Any]] = trainer.state.log_history
    return history
