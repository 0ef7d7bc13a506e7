"""Trainings of the original LLaVA code bases: both stages, and TinyLLaVA with the launcher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pre_kernels.integrations.handle import find_handle
from pre_kernels.integrations.launched import Launch

from .support.original_llava import SAMPLES, TinyLlava, build_original, original_batch, parts
from .support.tiny.training import InOrder, Samples, arguments


class ByName(InOrder):
    """Saves and groups parameters by name like LLaVA's trainer: stage 1 saves only the
    projector."""

    stage = 1

    def create_optimizer(self, *_: Any) -> Any:
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            [p for n, p in named if ("mm_projector" in n) is projector]
            for projector in (True, False)
        ]
        self.optimizer = torch.optim.SGD(
            [{"params": g} for g in groups if g], lr=self.args.learning_rate
        )
        return self.optimizer

    def _save_checkpoint(self, *args: Any) -> None:
        if self.stage > 1:
            return super()._save_checkpoint(*args)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir()
        torch.save(
            {n: p for n, p in self.model.named_parameters() if "mm_projector" in n},
            folder / "mm_projector.bin",
        )


def test_two_stages(tmp_path: Path) -> None:
    """Stage 1 trains the head beside the projector, and stage 2 continues with both. The model's
    own files do not contain the head."""

    def stage(number: int, model: Any, head: Path | None) -> Any:
        more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        with Launch({"layer": 2}, None if head is None else str(head)):
            trainer = ByName(
                model=model,
                args=arguments(tmp_path / str(number), 1, 4, **more),
                train_dataset=Samples(SAMPLES),
                data_collator=lambda indices: original_batch([SAMPLES[i] for i in indices]),
            )
            trainer.stage = number
            start = copy.deepcopy(model.pre_head.state_dict())
            trainer.train()
            if number > 1:
                trainer.save_model()
        assert not torch.equal(start["w1"], model.pre_head.w1)
        return start, trainer.state.log_history

    first = build_original()
    first.requires_grad_(False)
    first.model.mm_projector.requires_grad_(True)
    frozen = first.model.layers[0].mlp.up_proj.weight.clone()
    _, logs = stage(1, first, None)
    assert torch.equal(frozen, first.model.layers[0].mlp.up_proj.weight)
    assert logs[1]["pre_loss"] < logs[0]["pre_loss"]
    assert {p.name for p in (tmp_path / "1").iterdir()} == {
        *("checkpoint-1", "checkpoint-2"),
        *("pre_head.json", "pre_head.safetensors"),
    }
    assert (tmp_path / "1" / "checkpoint-1" / "pre_head.safetensors").exists()

    start, _ = stage(2, build_original(), tmp_path / "1")
    assert all(torch.equal(start[n], p) for n, p in first.pre_head.named_parameters())
    with safe_open(tmp_path / "2" / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= set(build_original().state_dict())


def test_tinyllava_by_the_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PRe trains with one term per image. The parts of the model, which are saved one by one, do
    not contain the head."""
    model = build_original(TinyLlava)
    with Launch({"layer": 2, "level": "image"}) as launch:
        trainer = InOrder(
            model=model,
            args=arguments(tmp_path, 1, 4, max_steps=3),
            train_dataset=Samples(SAMPLES),
            data_collator=lambda indices: original_batch(
                [SAMPLES[i] for i in indices], square=True
            ),
        )
        handle = find_handle(model)
        start = model.pre_head.w1.clone()
        trainer.train()
        launch.report()
    said = capsys.readouterr().err
    logs = trainer.state.log_history
    assert "attached to TinyLlava: layer 2 of" in said
    assert "WARNING" not in said
    assert logs[0]["pre_tokens"] == 16
    assert int(handle.count(original_batch(square=True))) == 4
    assert logs[2]["pre_loss"] < logs[1]["pre_loss"] < logs[0]["pre_loss"]
    assert not torch.equal(start, model.pre_head.w1)
    assert (tmp_path / "pre_head.safetensors").exists()
    assert not any("pre_head" in n for part in parts(model) for n, _ in part.named_parameters())
