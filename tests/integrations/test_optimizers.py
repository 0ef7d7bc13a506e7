"""The Trainer's optimizers: those that ignore groups, those that refuse some parameters, and states
of other trainings."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from pre_kernels.integrations import apply_pre, find_handle, patch_trainer
from pre_kernels.integrations.head_options import MARK
from pre_kernels.integrations.launched import Launch
from pre_kernels.integrations.trainer import _create_optimizer

from .support.processes import both
from .support.ranks import config, deepspeed, need_deepspeed
from .support.tiny.models import batch, build
from .support.tiny.training import InOrder, make

OWN = {"head_lr": 0.3, "head_weight_decay": 0.02}


def train(
    folder: Path, model: Any, kind: type = InOrder, resume: Any = None, **more: Any
) -> tuple[Any, list[str]]:
    """Train, and return (the trainer, PRe's warnings)."""
    with warnings.catch_warnings(record=True) as caught, patch_trainer():
        warnings.simplefilter("always")
        trainer = make(folder, model, kind, **more)
        trainer.train(resume_from_checkpoint=resume)
    return trainer, [text for w in caught if (text := str(w.message)).startswith("PRe: ")]


class Layerwise(InOrder):
    """Like the Trainer's optimizer for galore_adamw_layerwise: one optimizer for each parameter,
    which steps in its backward."""

    def create_optimizer(self, *_: Any) -> Any:
        each = {p: torch.optim.SGD([p], lr=0.1) for p in self.model.parameters() if p.requires_grad}

        def step(parameter: Any) -> None:
            each[parameter].step()
            each[parameter].zero_grad()

        for parameter in each:
            parameter.register_post_accumulate_grad_hook(step)
        self.optimizer = LayerWiseDummyOptimizer(optimizer_dict=each)
        return self.optimizer


class Lomo(torch.optim.SGD):
    """Recognised by its name: it steps all parameters alike."""


class Fused(InOrder):
    def create_optimizer(self, *_: Any) -> Any:
        self.optimizer = Lomo(self.model.parameters(), lr=0.1)
        return self.optimizer


@pytest.mark.parametrize("kind", [Layerwise, Fused])
@pytest.mark.parametrize("options", [{}, OWN], ids=["none", "own"])
def test_optimizers_without_groups(kind: type, options: dict[str, Any], tmp_path: Path) -> None:
    model = build("llava")
    handle = apply_pre(model, **options)
    before = handle.head.w1.detach().clone()
    trainer, said = train(tmp_path, model, kind)
    groups = len(getattr(trainer.optimizer, "optimizer", trainer.optimizer).param_groups)
    assert groups == 1
    assert not torch.equal(handle.head.w1, before)
    assert len(said) == bool(options)
    assert all("head_lr and head_weight_decay do nothing with" in text for text in said)


def test_an_engine_with_an_optimizer_and_a_frozen_head() -> None:
    """With a DeepSpeed config that has an optimizer, the head has no groups."""
    model = build("llava")
    handle = apply_pre(model, **OWN)
    handle.head.requires_grad_(False)
    trainer = SimpleNamespace(optimizer=None)

    def create() -> Any:
        trainer.optimizer = object()
        return trainer.optimizer

    with pytest.warns(UserWarning, match=r"do nothing with the optimizer of a DeepSpeed config"):
        _create_optimizer(create, handle, trainer, None)


class Matrices(InOrder):
    """Muon accepts only matrices, so the vectors are not trained here."""

    def create_optimizer(self, *_: Any) -> Any:
        named = dict(self.model.named_parameters())
        matrices = [
            p for n, p in named.items() if p.dim() == 2 and (self.with_head or "pre_head" not in n)
        ]
        self.optimizer = torch.optim.Muon(matrices, lr=0.01)
        return self.optimizer


@pytest.mark.parametrize("with_head", [True, False])
def test_an_optimizer_of_matrices(with_head: bool, tmp_path: Path) -> None:
    model = build("llava")
    handle = apply_pre(model)
    before = {name: p.detach().clone() for name, p in handle.head.named_parameters()}
    kind = type("Matrices", (Matrices,), {"with_head": with_head})
    _, said = train(tmp_path, model, kind, max_steps=2)
    changed = {
        name for name, p in handle.head.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {"w1", "w2"}
    assert len(said) == 1
    assert "Muon does not take parameters like b1, b2 of the head (Muon only supports 2D" in said[0]


def test_an_optimizer_of_matrices_under_the_launcher(tmp_path: Path) -> None:
    with Launch({}):
        trainer = make(tmp_path, build("llava"), type("Matrices", (Matrices,), {"with_head": True}))
        before = trainer.model.pre_head.w1.detach().clone()
        with pytest.warns(UserWarning, match="PRe: Muon does not take parameters like b1, b2"):
            trainer.train()
    assert not torch.equal(before, trainer.model.pre_head.w1)


class LoraLike(InOrder):
    """An optimizer of matrices that also takes vectors."""

    def create_optimizer(self, *_: Any) -> Any:
        chosen = [
            p for n, p in self.model.named_parameters() if p.dim() == 2 and "pre_head" not in n
        ]
        self.optimizer = torch.optim.AdamW(chosen, lr=0.01)
        return self.optimizer


def test_an_optimizer_that_only_has_matrices(tmp_path: Path) -> None:
    model = build("llava")
    apply_pre(model)
    trainer, said = train(tmp_path, model, LoraLike)
    assert [len(group["params"]) for group in trainer.optimizer.param_groups[1:]] == [2, 2]
    assert said == []


def test_watching_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match=r"optimizer: got int, want a torch.optim.Optimizer"):
        apply_pre(build("llava")).watch(3)


def test_watching_an_optimizer_that_an_engine_wrapped() -> None:
    """Wrapped like accelerate's optimizer around DeepSpeed's around torch's."""
    model = build("llava")
    handle = apply_pre(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.watch(SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner)))
    model(**batch("llava").inputs).loss.backward()
    inner.step()
    assert handle.metrics()["pre_head_grad_norm"] > 0


SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}


def moments(trainer: Any, own: bool) -> list[Any]:
    """Adam's averages of the head's parameters, or of the others, in their order."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    groups = [group for group in optimizer.param_groups if bool(group.get(MARK)) is own]
    states = [
        optimizer.state[p] for group in groups for p in group["params"] if p in optimizer.state
    ]
    return [state["exp_avg"].clone() for state in states if "exp_avg" in state]


class Loaded(InOrder):
    """Looks at the optimizer after its state has been loaded."""

    def _load_optimizer_and_scheduler(self, folder: Any) -> None:
        super()._load_optimizer_and_scheduler(folder)
        if folder is not None:
            self.kept = moments(self, False), moments(self, True)
            self.rates = list(self.lr_scheduler.base_lrs)


@pytest.mark.parametrize("saved_with", [False, True])
@pytest.mark.parametrize("resumed_with", [False, True])
def test_resuming_across_pre(
    saved_with: bool, resumed_with: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llava")
    if saved_with:
        apply_pre(model)
    first, _ = train(tmp_path, model, max_steps=2, **SAVING)
    saved = moments(first, False), moments(first, True)
    capsys.readouterr()

    model = build("llava")
    if resumed_with:
        apply_pre(model)
    logger = logging.getLogger("transformers.trainer")
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    try:
        second, said = train(tmp_path, model, Loaded, resume=True, max_steps=4, **SAVING)
    finally:
        logger.removeHandler(handler)
    assert second.state.global_step == 4
    assert (find_handle(model) is not None) is resumed_with
    for kept, wanted in zip(second.kept, saved, strict=True):
        if wanted is saved[0] or saved_with == resumed_with:
            assert len(kept) == len(wanted)
            assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))
        else:
            assert kept == []
    assert len(second.rates) == len(second.optimizer.param_groups)
    expected = {
        (False, False): ["this training has no PRe"],
        (True, True): [],
        (False, True): [
            "holds no head",
            "is of a training without PRe, or with a frozen head; the state of the other",
        ],
        (True, False): [
            "this training has no PRe",
            "is of a training with PRe; the state of the other parameters was loaded",
        ],
    }[saved_with, resumed_with]
    assert len(said) == len(expected)
    assert all(any(part in text for text in said) for part in expected)
    assert not any("pre_head" in record for record in records)
    line = f"PRe: the model's weights and the head are those of {tmp_path / 'checkpoint-2'}"
    assert (line in capsys.readouterr().err) is (saved_with and resumed_with)


def test_groups_of_another_number_are_torchs_to_judge(tmp_path: Path) -> None:
    model = build("llava")
    apply_pre(model)
    train(tmp_path, model, LoraLike, max_steps=2, **SAVING)
    model = build("llava")
    with pytest.raises(ValueError, match=r"different number of parameter groups"):
        train(tmp_path, model, resume=True, max_steps=4, **SAVING)


def prepared_by_accelerate() -> list[str]:
    """On one of two processes: an accelerate loop under DeepSpeed that watches the optimizer from
    `prepare`."""
    deepspeed()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    settings = config(2, 1) | {"train_batch_size": 2}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    handle = apply_pre(build("llava"))
    assert accelerator.distributed_type == "DEEPSPEED"
    model, optimizer = accelerator.prepare(
        handle.model, torch.optim.SGD(handle.model.parameters(), lr=0.1)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watching = handle.watch(optimizer)
        for _ in range(3):
            accelerator.backward(model(**batch("llava").inputs).loss)
            optimizer.step()
            optimizer.zero_grad()
    watching.remove()
    assert handle.metrics()["pre_forwards"] == 3
    return [text for w in caught if (text := str(w.message)).startswith("PRe: ")]


def test_watching_what_accelerate_prepared_for_deepspeed() -> None:
    need_deepspeed()
    assert both(prepared_by_accelerate) == [[], []]
