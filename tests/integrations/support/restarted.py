"""A training script that resumes from its last checkpoint, as torchrun restarts it after a failure.

Arguments: the output folder, and the name of the node that breaks down in step 3 (once).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.integrations.support.tiny.models import build
from tests.integrations.support.tiny.training import Samples, arguments, collate, one_image

STEPS = 6
SAMPLES = [one_image(2 + number) for number in range(2 * STEPS)]
LAST = "last"


class BreaksDown(TrainerCallback):
    """Waits in step 3 to be killed, or kills its own process."""

    def __init__(self, out: Path, how: str) -> None:
        self.out = out
        self.how = how

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        mark = self.out / "broken-down"
        if state.global_step == 3 and not mark.exists():
            mark.touch()
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(300)


def train(out: str, how: str | None = None) -> None:
    """Train to the end from the last checkpoint in `out`, and save."""
    trainer = Trainer(
        model=build("llava"),
        args=arguments(
            Path(out),
            1,
            1,
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=2,
            optim="adamw_torch",
            learning_rate=0.01,
            lr_scheduler_type="linear",
            ddp_backend="gloo",
            ddp_find_unused_parameters=True,
        ),
        train_dataset=Samples(SAMPLES),
        data_collator=collate("llava", SAMPLES),
        callbacks=[] if how is None else [BreaksDown(Path(out), how)],
    )
    last = get_last_checkpoint(out) if os.path.isdir(out) else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(f"{out}/{LAST}")


if __name__ == "__main__":
    folder, *broken = sys.argv[1:]
    os.makedirs(f"{folder}/pids", exist_ok=True)
    Path(f"{folder}/pids/{os.getpid()}").write_text(os.environ["NODE"])
    train(
        folder, *(how for node, how in [b.split("=") for b in broken] if node == os.environ["NODE"])
    )
