"""apply_pre(head_trainable=False): the model trains as under a head that trains, the head does not,
and nothing warns of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pre_kernels.integrations import apply_pre, find_handle, patch_trainer

from .support.attached import same_head
from .support.by_hand import assert_same_gradients, gradients
from .support.processes import both
from .support.ranks import TEXT_ONLY, by_hand, check, made, steps
from .support.tiny.models import batch, build
from .support.tiny.training import make
from .support.warned import said

FROZEN = {"head_trainable": False}


def step(**options: Any) -> tuple[dict[str, Any], list[str]]:
    """The gradients of the model in one step, and the matmuls of the step."""
    model = build("llava")
    same_head(apply_pre(model, **options))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**batch("llava").inputs).loss.backward()
    products = [e.name for e in profile.events() if e.name in ("aten::mm", "aten::addmm")]
    return gradients(model), products


@pytest.mark.parametrize("layer", [None, [1, 3]])
def test_the_same_gradients_with_two_products_less(layer: Any) -> None:
    grads, products = step(layer=layer, **FROZEN)
    wanted, all_products = step(layer=layer)
    of_head = [name for name in wanted if name.startswith("pre_head.")]
    assert of_head
    assert [name for name in grads if grads[name] is None and wanted[name] is not None] == of_head
    assert_same_gradients(grads, wanted | dict.fromkeys(of_head))
    assert len(all_products) - len(products) == 2 * len(layer or [2])


def test_a_loop_that_never_warns() -> None:
    model = build("llava")
    handle = apply_pre(model, **FROZEN)
    assert handle.param_groups() == []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = handle.head.w1.clone()

    def loop() -> None:
        handle.watch(optimizer)
        for _ in range(3):
            model(**batch("llava").inputs).loss.backward()
            optimizer.step()

    assert said(loop) == []
    metrics = handle.metrics()
    assert metrics["pre_tokens"] == 36
    assert "pre_head_grad_norm" not in metrics
    assert torch.equal(handle.head.w1, before)
    assert not {id(p) for p in handle.head.parameters()} & {id(p) for p in optimizer.state}
    assert str(handle).endswith("gelu, float32, frozen)")
    handle.remove()
    assert find_handle(model) is None


def test_a_trainer_saves_and_resumes_it(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    model = build("llava")
    handle = apply_pre(model, **FROZEN)
    head = handle.head.w1.clone()
    with patch_trainer(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="PRe: ")
        trainer = make(tmp_path, model, max_steps=2, **saving)
        trainer.train()
        assert not any(group.get("pre_head") for group in trainer.optimizer.param_groups)
        handle.remove()
        torch.manual_seed(7)
        handle = apply_pre(model, **FROZEN)
        assert not torch.equal(handle.head.w1, head)
        trainer = make(tmp_path, model, max_steps=4, **saving)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(handle.head.w1, head)
    assert not handle.head.w1.requires_grad
    assert trainer.state.log_history[-2]["pre_tokens"] > 0


def test_what_loads_it() -> None:
    """A frozen head and one that trains load each other's files."""
    model = build("llava")
    with apply_pre(model, **FROZEN) as handle:
        frozen = handle.settings()
    with apply_pre(model) as handle:
        assert handle.settings() == frozen


def ddp(samples: list[Any]) -> Any:
    model, handle = made(group="world", **FROZEN)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    losses = steps(wrapped, samples, wrapped.no_sync)
    assert all(p.grad is None for p in handle.head.parameters())
    return losses, {n: g for n, g in gradients(model).items() if not n.startswith("pre_head.")}


def test_ddp() -> None:
    losses, wanted = by_hand(TEXT_ONLY)
    of_model = {n: g for n, g in wanted.items() if not n.startswith("pre_head.")}
    check(both(ddp, TEXT_ONLY), (losses, of_model))


def test_a_wrong_value() -> None:
    with pytest.raises(TypeError, match=r"head_trainable: got 1, want True or False"):
        apply_pre(build("llava"), head_trainable=1)
