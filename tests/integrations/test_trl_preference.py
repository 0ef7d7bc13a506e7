"""TRL's preference and RL trainers have their own loss: patch_trainer adds exactly the gradient of
L_PRe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from safetensors.torch import load_file

from .support.tiny.models import IMAGE
from .support.tiny.preference import auxiliary, train

# Whether terms are counted ahead, which is impossible for batches of rows.
AHEAD = {
    "DPO": True,
    "KTO": True,
    "GRPO": False,
    "RLOO": False,
}


@pytest.mark.filterwarnings("default:.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", AHEAD)
def test_exactly_the_auxiliary_gradient_is_added(kind: str, tmp_path: Path) -> None:
    grads, handle, trainer, forwards, told = train(
        kind, tmp_path, save_strategy="steps", save_steps=1
    )
    plain, _, _, again, _ = train(kind, tmp_path / "plain", attached=False)
    assert len(forwards) == len(again) == (2 if AHEAD[kind] else 4)
    for forward, other in zip(forwards, again, strict=True):  # GRPO and RLOO also generate this
        assert all(torch.equal(forward[name], other[name]) for name in forward)

    added = auxiliary(forwards, handle.head, AHEAD[kind])
    assert grads.keys() == plain.keys() | {f"pre_head.{name}" for name in ("w1", "b1", "w2", "b2")}
    for name, gradient in grads.items():
        wanted = plain.get(name, 0) + added.get(name, 0)
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )

    log = trainer.state.log_history[0]
    tokens = [int((inputs["input_ids"] == IMAGE).sum()) for inputs in forwards]
    assert log["pre_tokens"] == sum(tokens)
    # Otherwise both kinds of means are the same.
    assert len(set(tokens)) > 1
    assert log["pre_cosine"] == -log["pre_loss"]
    assert log["pre_head_grad_norm"] > 0

    saved = load_file(tmp_path / "checkpoint-1" / "pre_head.safetensors")
    assert json.loads((tmp_path / "checkpoint-1" / "pre_head.json").read_text())
    assert len(saved) == 4
    assert not any(
        "pre_head" in name for name in load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    )
    assert len(told) == (0 if AHEAD[kind] else 1)
    assert all("counted" in message for message in told)


@pytest.mark.parametrize("kind", AHEAD)
def test_lora(kind: str, tmp_path: Path) -> None:
    """The reference is the model itself without its adapter, or a copy of it."""
    grads, handle, trainer, forwards, told = train(kind, tmp_path, lora=True)
    # LoRA's B is 0 at first, so the model is the plain one.
    added = auxiliary(forwards, handle.head, AHEAD[kind])
    for name in ("w1", "b1", "w2", "b2"):
        torch.testing.assert_close(
            grads[f"pre_head.{name}"], added[f"pre_head.{name}"], rtol=2e-4, atol=1e-7
        )
    assert trainer.state.log_history[0]["pre_tokens"] == sum(
        int((i["input_ids"] == IMAGE).sum()) for i in forwards
    )
    assert len(told) == (0 if AHEAD[kind] else 1)
