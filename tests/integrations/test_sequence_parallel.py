"""Processes that share sequences under DeepSpeed's Ulysses: the gradients are those of one process
on whole sequences. What cannot run is refused."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from pre_kernels.integrations import apply_pre, patch_trainer
from pre_kernels.integrations.pre_callback import PreCallback

from .support.by_hand import assert_same_gradients
from .support.processes import both
from .support.ranks import need_deepspeed
from .support.sequences import (
    ACROSS,
    LATE,
    TEXT,
    TWO_IMAGES,
    by_hand,
    context_trainer,
    looped,
    trained,
    whole_batches,
)

OLD = transformers.__version__.startswith("4.")


def need_ulysses_in_trainers() -> None:
    need_deepspeed()
    if OLD:
        pytest.skip("the Trainer of transformers 4.57 does not know sp_size")


def need_adapter() -> None:
    need_deepspeed()
    if Version(version("deepspeed")) < Version("0.19.8"):
        pytest.skip("the data loader of DeepSpeed 0.19.6 gathers 0-d tensors, which gloo refuses")


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Parameters that no process used do not move."""
    zeros = {n for n, g in found.items() if wanted[n] is None and not g.any()}
    assert_same_gradients({n: None if n in zeros else g for n, g in found.items()}, wanted)


def check_logs(logs: list[dict[str, float]], samples: list[Any]) -> None:
    """The log is that of one process on the whole sequences."""
    loss, pre = by_hand("llava", samples)[1:]
    assert logs[0]["task_loss"] == pytest.approx(loss, rel=1e-5)
    assert logs[0]["pre_loss"] == pytest.approx(pre, rel=1e-4)
    assert logs[0]["loss"] == pytest.approx(loss + 0.5 * pre, rel=1e-5)


CASES = {
    "ZeRO-3": ("llava", 3, [TWO_IMAGES, LATE]),
    "an image that is cut": ("llava", 3, [ACROSS, TWO_IMAGES]),
    "ZeRO-2": ("llava", 2, [TWO_IMAGES, LATE]),
    "M-RoPE": ("qwen2_5_vl", 3, [ACROSS, LATE]),
}


@pytest.mark.parametrize(
    "case",
    ["ZeRO-3", "ZeRO-2"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("an image that is cut", "M-RoPE")],
)
def test_trainer(case: str, tmp_path: Path) -> None:
    """accelerate's `sp_size=2`. The images reach the model by hooks of the test, because no model
    of transformers merges images into a part of the ids.

    LATE's first half has an image but no label, and its second half no image. Under ZeRO-2
    DeepSpeed's gradients, those of the model's loss too, are twice those of the whole sequences.
    """
    need_ulysses_in_trainers()
    family, stage, samples = CASES[case]
    scale = 2 if stage == 2 else 1
    wanted = by_hand(family, samples, scale)[0]
    for moved, logs in both(trained, family, samples, str(tmp_path), stage):
        check(moved, wanted)
        if family == "llava":
            check_logs(logs, samples)


def without_hooks(folder: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"pixel_values's shape .* must match input_ids's shape torch.Size\(\[1, 18\]\)",
    ):
        trained("llava", [LATE] * 2, folder, tensors=True)


def test_trainer_does_not_take_images(tmp_path: Path) -> None:
    """DeepSpeed's adapter of data loaders refuses tensors that it cannot cut, with and without
    PRe."""
    need_ulysses_in_trainers()
    both(without_hooks, str(tmp_path))


def test_own_loop() -> None:
    need_adapter()
    samples = [TWO_IMAGES, LATE]
    wanted = by_hand("llava", samples, together=False)[0]
    for moved in both(looped, samples):
        check(moved, wanted)


def misused() -> None:
    with pytest.raises(ValueError, match="labels: got 'labels', want None under DeepSpeed's"):
        looped([TWO_IMAGES, LATE], labels="labels")
    with pytest.raises(ValueError, match="anchor: "):
        looped([TWO_IMAGES, LATE], first=True)
    with pytest.warns(UserWarning, match='PRe: processes share each sequence, and level="image"'):
        looped([TWO_IMAGES, LATE], level="image")


def test_own_loop_that_would_be_wrong() -> None:
    """L_PRe in a loss that is weighed by labels, an anchor that is not cut, and images that may
    be."""
    need_adapter()
    both(misused)


def cut_unseen(folder: str) -> None:
    with pytest.raises(ValueError, match=r"rows: the visual mask has shape \(1, 18\), the hidden"):
        whole_batches([LATE], folder, cut_mask=False)


def test_whole_batches_in_a_trainer(tmp_path: Path) -> None:
    """Frameworks of their own give every process the whole batch and cut its embeddings. `mask_fn`
    marks the part of this process, so the step's terms are counted once."""
    samples = [TWO_IMAGES, ACROSS]
    wanted = by_hand("llava", samples, model_loss=False)[0]
    for found in both(whole_batches, samples, str(tmp_path), True):
        found = {n: found.get(n) for n in wanted}
        check({n: torch.zeros(()) if g is None else g for n, g in found.items()}, wanted)
    both(cut_unseen, str(tmp_path))


def refuse_context(folder: str) -> None:
    trainer = context_trainer(folder, [LATE] * 2)
    apply_pre(trainer.model)
    with (
        patch_trainer(),
        pytest.raises(
            ValueError,
            match="parallelism_config: got cp_size=2, want 1: the Trainer cuts input_ids",
        ),
    ):
        trainer.train()


def refuse_context_by_callback(folder: str) -> None:
    trainer = context_trainer(folder, [LATE] * 2, callbacks=[PreCallback()])
    with pytest.raises(ValueError, match="parallelism_config: got cp_size=2, want 1"):
        trainer.train()


def context_without_pre(folder: str) -> None:
    # CLIP's attention would be cut too.
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        context_trainer(folder, [TWO_IMAGES] * 2, tower="eager").train()


def text_in_context(folder: str) -> None:
    with pytest.raises(NotImplementedError, match=r"attention_for_cpu.* does not have a sharding"):
        context_trainer(folder, [TEXT] * 2).train()


@pytest.mark.parametrize(
    "what", [refuse_context, refuse_context_by_callback, context_without_pre, text_in_context]
)
def test_context_parallelism(what: Any, tmp_path: Path) -> None:
    """accelerate's `cp_size=2`, which a Trainer with PRe refuses. Without PRe no model merges the
    images with a part of the ids, and torch cannot cut the attention of text on a CPU."""
    if torch.__version__.startswith("2.9.") and what in (context_without_pre, text_in_context):
        pytest.skip("torch 2.9 asserts that a length is a multiple of 4")
    both(what, str(tmp_path))
