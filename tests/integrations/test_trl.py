"""TRL's SFTTrainer computes its own loss: with patch_trainer the auxiliary gradient is exact,
without it is 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("trl")
from peft import LoraConfig

from .support.by_hand import copy_of, pre_loss, watch
from .support.tiny.models import IMAGE, Batch, build
from .support.tiny.training import own_loss
from .support.tiny.trl import batches, train

needs_5_18 = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18),
    reason="TRL needs transformers 5.18 for it",
)
COUNTS = [1, 0, 2, 1]  # images in each conversation


def auxiliary(
    data: list[dict[str, torch.Tensor]], like: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """The gradients of 0.5 · Σℓ ÷ the number of visual tokens of all `data`, on a fresh model with
    this head."""
    model = build("llava")
    head = copy_of(like)
    seen = watch(model, "llava")
    tokens = sum(int((inputs["input_ids"] == IMAGE).sum()) for inputs in data)
    for inputs in data:
        model(**inputs)
        visual = Batch(inputs, inputs["input_ids"] == IMAGE)
        (0.5 / tokens * pre_loss(seen, visual, [2], head, reduction="sum")).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads | {f"pre_head.{name}": p.grad for name, p in head.items()}


# Options that TRL deprecates are used while TRL accepts them.
@pytest.mark.filterwarnings("default:.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("accumulation", "options"),
    [
        (1, {}),
        (2, {}),
        (4, {}),
        pytest.param(2, {"assistant_only_loss": True}, marks=needs_5_18),
        (2, {"loss_type": "dft"}),
        (2, {"label_smoothing_factor": 0.1}),
        (2, {"compute_loss_func": own_loss}),
        (2, {"gradient_checkpointing": True}),
        (2, {"average_tokens_across_devices": False}),
    ],
    # Addresses of functions are removed, so that the names are the same in each process of
    # pytest-xdist.
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(value) or "plain",
)
def test_exactly_the_auxiliary_gradient_is_added(
    accumulation: int, options: dict[str, Any], tmp_path: Path
) -> None:
    grads, handle, trainer = train(COUNTS, tmp_path, accumulation, **options)
    plain, _, without = train(COUNTS, tmp_path, accumulation, attached=False, **options)
    added = auxiliary(batches(trainer, COUNTS), handle.head)
    assert grads.keys() == plain.keys() | {f"pre_head.{name}" for name in ("w1", "b1", "w2", "b2")}
    for name, gradient in grads.items():
        wanted = plain.get(name, 0) + added.get(name, 0)
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    log = trainer.state.log_history[0]
    assert log["pre_tokens"] == 16
    assert log["pre_cosine"] == -log["pre_loss"]
    # transformers 4 rounds both losses to 4 decimals.
    assert log["task_loss"] == pytest.approx(without.state.log_history[0]["loss"], abs=1.1e-4)
    assert log["loss"] - log["task_loss"] == pytest.approx(0.5 * log["pre_loss"], abs=1e-5)


def test_lora(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.[qv]_proj")
    found, handle, trainer = train(COUNTS, tmp_path, 2, peft_config=config)
    # LoRA's B is 0 at first, so the model is the plain one.
    added = auxiliary(batches(trainer, COUNTS), handle.head)
    for name in ("w1", "b1", "w2", "b2"):
        torch.testing.assert_close(
            found[f"pre_head.{name}"], added[f"pre_head.{name}"], rtol=2e-4, atol=1e-7
        )


def test_without_the_patch_the_watchdog_warns_once(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"computed but never back-propagated.*use patch_trainer"
    ) as caught:
        found, handle, _ = train(COUNTS, tmp_path, 4, patched=False, max_steps=3)
    assert sum("back-propagated" in str(w.message) for w in caught) == 1
    assert not any(name.startswith("pre_head") for name in found)
    assert handle.metrics()["pre_tokens"] == 48
