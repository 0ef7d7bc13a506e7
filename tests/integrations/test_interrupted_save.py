"""Checkpoints whose writing was cut off, as by a node that dies: resuming never takes a part of a
head."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pre_kernels.integrations import apply_pre, patch_trainer
from pre_kernels.integrations.checkpoint import CONFIG, WEIGHTS
from pre_kernels.integrations.pre_callback import PreCallback

from .support.tiny.models import build
from .support.tiny.training import make

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


class Killed(BaseException):
    """Ends a training at once, where a real process would be gone."""


def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's weights of the second checkpoint are cut off."""
    write = safetensors.torch.save_file

    def cut(tensors: Any, path: Any, *more: Any) -> None:
        write(tensors, path, *more)
        if "checkpoint-2" in str(path) and WEIGHTS in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            raise Killed

    monkeypatch.setattr(safetensors.torch, "save_file", cut)


def between(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint has the head's weights, and lacks the file beside them."""
    move = os.replace

    def first(source: Any, target: Any) -> None:
        if "checkpoint-2" in str(target) and CONFIG in str(target):
            raise Killed
        move(source, target)

    monkeypatch.setattr(os, "replace", first)


def test_a_head_that_was_half_saved_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has the weights of one head and the settings of another."""
    folder = tmp_path / "checkpoint-2"
    first, second = (apply_pre(build("llava"), layer=layer) for layer in (2, 3))
    first.save(folder)
    with monkeypatch.context() as patched:
        between(patched)
        with pytest.raises(Killed):
            second.save(folder)
    with pytest.raises(
        ValueError, match=r"written with layers \[3\], pre_head.json beside it says \[2"
    ):
        first.load(folder)
    second.save(folder)
    second.load(folder)


@pytest.mark.parametrize("cut", [half, between])
@pytest.mark.parametrize("by", ["patch_trainer", "PreCallback"])
def test_a_part_of_a_head_is_not_resumed(
    cut: Any, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the part. From the checkpoint before, the training has the same end as
    without the interruption."""
    whole = trained(by, tmp_path / "whole", None)
    with monkeypatch.context() as patched:
        cut(patched)
        with pytest.raises(Killed):
            trained(by, tmp_path / "cut", None)
    assert {p.name for p in (tmp_path / "cut").glob("checkpoint-*")} == {
        "checkpoint-1",
        "checkpoint-2",
    }
    with pytest.raises(
        ValueError, match=r"checkpoint-2/pre_head\.\w+' is missing, got .* interrupted; want both"
    ):
        trained(by, tmp_path / "cut", True)
    resumed = trained(by, tmp_path / "cut", str(tmp_path / "cut" / "checkpoint-1"))
    # By itself the Trainer does not restore all of this model.
    assert same(resumed, whole) or by == "PreCallback"
    trained(by, tmp_path / "cut", True)


def test_a_checkpoint_that_was_cut_off_after_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer writes its own state last, and refuses a checkpoint without it."""
    from transformers import Trainer

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
        with pytest.raises(Killed):
            trained("patch_trainer", tmp_path, None)
    assert (tmp_path / "checkpoint-1" / CONFIG).exists()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-1/trainer_state\.json"):
        trained("patch_trainer", tmp_path, True)


def trained(by: str, folder: Path, resume: Any) -> dict[str, torch.Tensor]:
    """Train two steps, each with a checkpoint; all tensors at the end."""
    model = build("llava")
    callbacks = [PreCallback(layer=2)] if by == "PreCallback" else []
    with contextlib.nullcontext() if callbacks else patch_trainer():
        if not callbacks:
            apply_pre(model, layer=2)
        make(folder, model, accumulation=1, callbacks=callbacks, **SAVING).train(
            resume_from_checkpoint=resume
        )
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )
