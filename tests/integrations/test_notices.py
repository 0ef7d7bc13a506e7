"""Warnings about a training that is wrong from its start are given once, in loops of one's own and
under the Trainer."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from pre_kernels.integrations import apply_pre, find_handle, metrics, optimizers, patch_trainer
from pre_kernels.integrations.metrics import PATIENCE
from pre_kernels.integrations.notices import WARNINGS, Notices

from .support.tiny.models import batch, build
from .support.tiny.training import make
from .support.warned import said


def steps(
    model: nn.Module, optimizer: Any, number: int = 4, accumulation: int = 2, progress: Any = None
) -> None:
    inputs = batch("llava").inputs
    for step in range(number):
        if progress is not None:
            progress(step)
        for _ in range(accumulation):
            model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def before(model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_pre(model)
    return optimizer


def by_name(model: nn.Module) -> Any:
    apply_pre(model)
    return torch.optim.AdamW([p for n, p in model.named_parameters() if "projector" in n])


def watched(model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(list(model.parameters()))
    apply_pre(model).watch(optimizer)
    return optimizer


def head_alone(model: nn.Module) -> Any:
    return torch.optim.AdamW(apply_pre(model).param_groups())


def frozen_after(model: nn.Module) -> Any:
    apply_pre(model)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("arrange", "name"),
    [
        (before, "optimizer without the head"),
        (by_name, "optimizer without the head"),
        (watched, "optimizer without the head"),
        (head_alone, "optimizer without the model"),
        (frozen_after, "frozen head"),
    ],
)
def test_an_optimizer_that_leaves_out(arrange: Any, name: str) -> None:
    model = build("llava")
    texts = said(lambda: steps(model, arrange(model)))
    assert len(texts) == 1
    first, last = WARNINGS[name].split("{optimizer}")[0], WARNINGS[name].split("}")[-1]
    assert texts[0].startswith(f"PRe: {first}")
    assert texts[0].endswith(last)


def test_a_head_that_is_thawed_but_not_given_to_the_optimizer() -> None:
    model = build("llava")
    optimizer = frozen_after(model)
    assert len(said(lambda: steps(model, optimizer))) == 1
    find_handle(model).head.requires_grad_(True)  # type: ignore[union-attr]
    texts = said(lambda: steps(model, optimizer))
    assert len(texts) == 1
    assert texts[0].startswith("PRe: the optimizer (SGD) steps the model but not `pre_head`")


def test_watching_an_optimizer_without_the_head_says_it_at_once() -> None:
    assert [text[:50] for text in said(lambda: watched(build("llava")))] == [
        "PRe: the optimizer (SGD) steps the model but not `"
    ]


def one(model: nn.Module) -> Any:
    apply_pre(model)
    return torch.optim.SGD(model.parameters(), lr=0.1)


class Two:
    """Two optimizers, one of them with the head's weights and the other with everything else, like
    Muon beside AdamW."""

    def __init__(self, model: nn.Module) -> None:
        head = apply_pre(model).head
        weights = {id(head.w1), id(head.w2)}
        self.all = [
            torch.optim.SGD([p for p in model.parameters() if id(p) not in weights]),
            torch.optim.AdamW([head.w1, head.w2]),
        ]

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad()


def another_models(model: nn.Module) -> Any:
    """Another optimizer steps before it, like a discriminator's."""
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    apply_pre(model)
    mine = torch.optim.SGD(model.parameters())
    return SimpleNamespace(step=lambda: (other.step(), mine.step()), zero_grad=mine.zero_grad)


def flat_copies(model: nn.Module) -> Any:
    """An engine whose optimizer has copies of the parameters."""
    apply_pre(model)
    return torch.optim.SGD([torch.zeros(9, requires_grad=True)])


@pytest.mark.parametrize("arrange", [one, Two, another_models, flat_copies])
def test_an_optimizer_that_has_all(arrange: Any) -> None:
    model = build("llava")
    assert said(lambda: steps(model, arrange(model))) == []


def test_the_hook_on_optimizers_goes_with_the_last_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = _global_optimizer_pre_hooks
    monkeypatch.setattr(optimizers, "_live", weakref.WeakSet())
    monkeypatch.setattr(optimizers, "_hook", None)
    there = dict(hooks)
    first, second = apply_pre(build("llava")), apply_pre(build("llava"))
    assert len(hooks) == len(there) + 1
    first.remove()
    assert len(hooks) == len(there) + 1
    second.remove()
    assert dict(hooks) == there

    lost = copy.deepcopy(apply_pre(build("llava")).model)
    # torch continues with this hook after ours.
    others = register_optimizer_step_pre_hook(lambda *_: None)
    del lost
    gc.collect()
    torch.optim.SGD(nn.Linear(2, 2).parameters()).step()  # no handle is left
    others.remove()
    apply_pre(build("llava")).remove()
    assert dict(hooks) == there


@pytest.mark.parametrize(
    "options", [{"schedule": "cosine"}, {"warmup": 0.5}, {"schedule": "cosine", "warmup": 0.1}]
)
def test_a_schedule_without_progress(options: dict[str, Any], tmp_path: Path) -> None:
    def loop(progress: bool) -> None:
        model = build("llava")
        handle = apply_pre(model, **options)
        optimizer = torch.optim.SGD(model.parameters())
        steps(
            model,
            optimizer,
            progress=(lambda step: setattr(handle, "progress", (step + 0.5) / 4))
            if progress
            else None,
        )
        weights.append(handle.scheduled_weight)

    weights: list[float] = []
    texts = said(lambda: loop(False))
    assert len(texts) == 1
    assert f"handle.progress was never set, so λ stays {weights[0]:g}" in texts[0]
    assert said(lambda: loop(True)) == []

    def trainer(patched: bool) -> None:
        model = build("llava")
        apply_pre(model, **options)
        trainer = make(tmp_path, model, max_steps=4)
        if patched:
            with patch_trainer():
                trainer.train()
        else:
            trainer.train()

    assert said(lambda: trainer(True)) == []
    assert any("handle.progress was never set" in text for text in said(lambda: trainer(False)))


@pytest.mark.parametrize("trained", ["layers.3", "lm_head"])
def test_nothing_below_the_layer_trains(trained: str) -> None:
    """The gradients are those without PRe, although the log looks right."""

    def gradients(attached: bool) -> dict[str, Any]:
        model = build("llava")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        if attached:
            apply_pre(model, layer=2)
        for _ in range(3):
            model.zero_grad()
            model(**batch("llava").inputs).loss.backward()
        return {
            n: p.grad
            for n, p in model.named_parameters()
            if p.grad is not None and "pre_head" not in n
        }

    texts = said(lambda: gradients(True))
    assert len(texts) == 1
    assert "no hidden state that enters L_PRe at layer 2 requires grad" in texts[0]
    plain, with_pre = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], with_pre[name]) for name in plain)


def test_a_projector_below_the_layer_is_enough() -> None:
    model = build("llava")
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    apply_pre(model)
    assert said(lambda: model(**batch("llava").inputs).loss.backward()) == []


def test_the_handle_is_on_another_model(tmp_path: Path) -> None:
    """`model_init` makes a new model in train(); a notebook makes its own model again; apply_pre
    was forgotten."""

    def init() -> None:
        trainer = make(tmp_path, None, model_init=lambda: build("llava"))
        apply_pre(trainer.model)
        with patch_trainer():
            trainer.train()
        assert find_handle(trainer.model) is None

    def forgotten() -> None:
        with patch_trainer():
            make(tmp_path, build("llava")).train()

    for training in (init, forgotten):
        texts = said(training)
        assert len(texts) == 1
        assert (
            "this training has no PRe: patch_trainer() is in use, but the model of InOrder, a Llava"
            in texts[0]
        )


def test_the_handle_is_on_a_part_of_the_model(tmp_path: Path) -> None:
    def inside() -> None:
        model = build("llava")
        apply_pre(model.model)
        with patch_trainer():
            make(tmp_path, model).train()

    texts = said(inside)
    assert len(texts) == 1
    assert (
        "the handle is on a LlavaModel inside the LlavaForConditionalGeneration that is trained"
        in texts[0]
    )


def test_lora_around_the_handles_model_is_no_other_model(tmp_path: Path) -> None:
    def training() -> None:
        model = build("llava")
        apply_pre(model)
        lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["pre_head"])
        with patch_trainer():
            make(tmp_path, get_peft_model(model, lora)).train()

    assert said(training) == []


@pytest.mark.parametrize("inner", [False, True])
def test_training_forwards_without_labels(inner: bool) -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model.model if inner else model)
    inputs = {name: value for name, value in data.inputs.items() if name != "labels"}

    def loop() -> None:
        for _ in range(4):
            model(**inputs).logits.float().logsumexp(-1).mean().backward()

    texts = said(loop)
    assert len(texts) == 1
    assert (
        "the last 2 backward passes were of training forwards without `labels`, which have no L_PRe"
        in texts[0]
    )
    assert handle.metrics()["pre_forwards"] == 0


def test_unlabelled_forwards_beside_labelled_ones_are_meant() -> None:
    """This is normal in semi-supervised training."""
    model = build("llava")
    data = batch("llava")
    apply_pre(model)
    inputs = {name: value for name, value in data.inputs.items() if name != "labels"}

    def loop() -> None:
        for _ in range(3):
            model(**data.inputs).loss.backward()
            for _ in range(3):
                model(**inputs).logits.float().logsumexp(-1).mean().backward()

    assert said(loop) == []


TEXT = [("text", 6)]
IMAGE = [("image", 8, 8), ("text", 4)]


@pytest.mark.parametrize("seen", [None, 0, 3])
def test_a_loop_whose_batches_have_no_visual_token(seen: int | None) -> None:
    """Unless the forward `seen` has one. It is said when the metrics are read."""
    handle = apply_pre(build("llava"))

    def loop() -> None:
        for forward in range(PATIENCE + 1):
            handle.model(**batch("llava", [IMAGE if forward == seen else TEXT]).inputs)
            if forward % 10 == 0:
                handle.metrics()

    texts = said(loop)
    wanted = "PRe: none of the 101 forwards so far had a visual token that counts, so the head"
    assert [text[: len(wanted)] for text in texts] == ([wanted] if seen is None else [])


def test_a_trainer_whose_batches_have_no_visual_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PATIENCE", 4)

    def training(samples: Any) -> None:
        with apply_pre(build("llava")) as handle, patch_trainer():
            make(tmp_path, handle.model, samples=samples, max_steps=3, logging_steps=1).train()

    texts = said(lambda: training([TEXT, TEXT]))
    assert len(texts) == 1
    assert texts[0].startswith("PRe: none of the 4 forwards so far had a visual token that counts")
    assert said(lambda: training([IMAGE, TEXT])) == []


def test_each_is_said_once_a_training(tmp_path: Path) -> None:
    notices = Notices()
    say = lambda: notices.warn("no progress", weight=0.0)  # noqa: E731
    assert len(said(lambda: (say(), say()))) == 1
    notices.forget()
    assert len(said(say)) == 1

    model = build("llava")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    apply_pre(model)
    with patch_trainer():
        texts = said(lambda: [make(tmp_path, model, max_steps=3).train() for _ in range(2)])
    assert [text[:24] for text in texts] == ["PRe: no hidden state tha"] * 2
