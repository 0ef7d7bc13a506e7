"""The folder of unfinished arms: whether it has room, and the checkpoints in it.

None of this changes what an arm measures.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import TrainerCallback

from pre_kernels.screen import PARTIAL

from .pieces import Unavailable

# The last file of a checkpoint.
TRAINED = "trained.safetensors"
# The gigabytes that an arm takes at most of the memory and, for its checkpoints, of the disk.
GIGABYTES = {"smollm2": 5.0, "gemma3": 10.0}
# With fewer free bytes, a save that failed is taken for one on a full disk.
LITTLE = 2e9


def fingerprint(what: Mapping[str, Any]) -> str:
    """Return 12 hex digits of what JSON can hold."""
    text = json.dumps(what, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_room(name: str, gigabytes: float, jobs: int, folder: Path) -> None:
    """Raise Unavailable unless memory and disk are enough for `jobs` arms at once. What `folder`
    holds of them already counts as free."""
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    for what, free, mend in (
        ("memory", psutil.virtual_memory().available, "close other programs"),
        ("disk", psutil.disk_usage(str(there)).free + kept, "choose a folder on another disk"),
    ):
        free /= 1e9
        if free < jobs * gigabytes:
            fits = int(free // gigabytes)
            instead = f"use --jobs {fits}" if fits else f"{mend}, or use another machine"
            raise Unavailable(
                f"{what}: training {name} needs {gigabytes:g} GB for each arm, "
                f"{jobs * gigabytes:g} GB for {jobs} at once, and {free:.1f} GB are free; {instead}"
            )


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Raise OSError where a save failed since the disk is full: safetensors and torch.save raise
    errors of their own."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError) as error:
        if psutil.disk_usage(str(folder)).free > LITTLE:
            raise
        reason = f"{os.strerror(errno.ENOSPC)} ({error})"
        full = OSError(errno.ENOSPC, reason, str(folder))
        raise full from error


class Weights(TrainerCallback):
    """Save the trained weights in each checkpoint under their own names, and then remove the older
    one, which must be there until the new one is whole.

    `save_pretrained` renames those of a LLaVA, and the Trainer, as of transformers 5.24, leaves out
    what has another name when it resumes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        trained = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        own = self.folder / f"checkpoint-{state.global_step}"
        partial = own / (TRAINED + PARTIAL)
        save_file(trained, partial)
        partial.replace(own / TRAINED)
        for older in set(self.folder.glob("checkpoint-*")) - {own}:
            # The next save tries again.
            shutil.rmtree(older, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint that is whole."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINED}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
