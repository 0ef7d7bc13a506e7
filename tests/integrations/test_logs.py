"""The values that a training logs of PRe: its loss, cosine, tokens, and the norm of the head's
gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from pre_kernels import PreHead, reference
from pre_kernels.integrations import apply_pre, patch_trainer
from pre_kernels.integrations.metrics import SAMPLE, sample_cosine

from .support.by_hand import copy_of, pre_loss, watch
from .support.tiny.models import batch, build
from .support.tiny.training import UNEQUAL_IMAGES, Recorder, make

LOGGED = ("task_loss", "pre_loss", "pre_cosine", "pre_tokens", "pre_head_grad_norm")


class Seen(TrainerCallback):
    """Keeps the values that on_log callbacks get, such as those of wandb and TensorBoard."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("loss", ["cosine", "mse"])
@pytest.mark.parametrize("level", ["patch", "image"])
@pytest.mark.parametrize("layers", [[2], [1, 3]])
def test_logs(loss: str, level: str, layers: list[int], tmp_path: Path) -> None:
    model = build("llava")
    seen = Seen()
    recorder = Recorder()
    handle = apply_pre(model, layers, loss=loss, level=level)
    head = copy_of(handle.head)
    with patch_trainer():
        trainer = make(
            tmp_path, model, samples=UNEQUAL_IMAGES, callbacks=[seen, recorder], max_steps=2,
            logging_steps=2, learning_rate=0.0, max_grad_norm=0.05,
        )  # fmt: skip
        trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {name: log[name] for name in LOGGED} == {name: seen.logs[0][name] for name in LOGGED}
    assert log["pre_tokens"] == 2 * 16
    assert not any(name in log for name in ("pre_rows", "pre_forwards", "pre_weight"))

    plain = build("llava")
    watched = watch(plain, "llava")
    sums = {"cosine": 0.0, loss: 0.0}
    count = 0
    for index, sample in enumerate(UNEQUAL_IMAGES):
        data = batch("llava", [sample], seed=index)
        plain(**data.inputs)
        for kind in sums:
            sums[kind] += float(
                pre_loss(watched, data, layers, head, level, loss=kind, reduction="sum").detach()
            )
        count += int(data.visual.sum()) if level == "patch" else len(data.lengths)
    assert log["pre_loss"] == pytest.approx(sums[loss] / count, rel=1e-5)
    each = [log[f"pre_loss/layer_{layer}"] for layer in layers] if layers[1:] else [log["pre_loss"]]
    assert log["pre_loss"] == pytest.approx(sum(each) / len(layers))
    assert log["pre_cosine"] == pytest.approx(-sums["cosine"] / count, rel=1e-5)
    gradients = [g for n, g in recorder.steps[-1].items() if n.startswith("pre_head")]
    assert log["pre_head_grad_norm"] == pytest.approx(
        float(torch.cat([g.flatten() for g in gradients]).norm())
    )
    # The logged norm is after clipping, as the optimizer gets it.
    assert log["pre_head_grad_norm"] < 0.05


@pytest.mark.parametrize("kind", ["mask", "compact", "all", "none"])
def test_sampled_cosines(kind: str) -> None:
    """At most SAMPLE rows, spread over all; all rows if there are fewer."""
    generator = torch.Generator().manual_seed(0)
    head = PreHead(8, out_dim=5)
    for rows in (40, 2000):
        hidden = torch.randn(2, rows, 8, generator=generator)
        anchor = torch.randn(2, rows, 5, generator=generator)
        mask = torch.rand(2, rows, generator=generator) < (0 if kind == "none" else 0.4)
        target, chosen = (anchor, mask) if kind in ("mask", "none") else (anchor[mask], mask)
        if kind == "all":
            hidden = hidden[0]
            target = anchor[0]
            chosen = None
            mask = torch.ones(rows, dtype=torch.bool)
            anchor = target
        total, number = sample_cosine(head, hidden, target, chosen, "torch").tolist()
        every = -reference.pre_loss(
            hidden, anchor, head.w1, head.b1, head.w2, head.b2, mask, reduction="none"
        ).detach()
        assert number == min(len(every), SAMPLE)
        if len(every) <= SAMPLE:
            assert total == pytest.approx(float(every.sum()), abs=1e-4)
        else:
            places = (torch.arange(SAMPLE) * (len(every) / SAMPLE)).long()
            assert total == pytest.approx(float(every[places].sum()), abs=1e-3)
