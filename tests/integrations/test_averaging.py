"""EncoderAnchor(ema=): anchors of the moving average of an encoder that trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from pre_kernels.integrations import EncoderAnchor, apply_pre, patch_trainer

from .support.processes import both
from .support.ranks import deepspeed, engine, need_deepspeed
from .support.tiny.models import batch, build
from .support.tiny.training import make
from .support.waits import Waits

SAME = {"image_mean": None, "image_std": None}


def attached(model: nn.Module, **options: Any) -> tuple[Any, EncoderAnchor]:
    """PRe towards the average of the model's own vision tower."""
    anchor = EncoderAnchor(model.model.vision_tower, model, **SAME, **({"ema": 0.9} | options))
    return apply_pre(model, anchor=anchor), anchor


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(average: list[torch.Tensor], module: nn.Module) -> list[torch.Tensor]:
    return [0.9 * a + 0.1 * p for a, p in zip(average, weights(module), strict=True)]


def same(found: nn.Module, wanted: list[torch.Tensor]) -> None:
    for own, tensor in zip(found.parameters(), wanted, strict=True):
        torch.testing.assert_close(own, tensor, rtol=1e-5, atol=1e-7)


def test_it_follows_each_step() -> None:
    """With accumulation, and with PRe off for a while."""
    model = build("llava")
    tower = model.model.vision_tower
    handle, anchor = attached(model)
    by_hand = weights(tower)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = batch("llava")
    for step in range(5):
        handle.enabled = step != 2
        for _ in range(2):
            model(**data.inputs).loss.backward()
            if handle.enabled:
                same(anchor.encoder, by_hand)
        before = weights(tower)
        optimizer.step()
        optimizer.zero_grad()
        assert any(not torch.equal(a, b) for a, b in zip(before, weights(tower), strict=True))
        by_hand = moved(by_hand, tower)
    assert not any(p.requires_grad for p in anchor.encoder.parameters())
    assert all(p.grad is None for p in anchor.encoder.parameters())
    assert not anchor.encoder.training
    assert tower.training


def test_the_targets_are_the_averages_features() -> None:
    model = build("llava")
    tower = model.model.vision_tower
    handle, _ = attached(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    given = []
    handle.head.register_forward_pre_hook(lambda module, args: given.append(args[1]))
    data = batch("llava")
    twin = copy.deepcopy(tower)
    for step in range(2):
        model(**data.inputs).loss.backward()
        plain = EncoderAnchor(copy.deepcopy(twin), model, **SAME)
        torch.testing.assert_close(given[step], plain(data.inputs, data.visual))
        optimizer.step()
        for own, tensor in zip(twin.parameters(), moved(weights(twin), tower), strict=True):
            own.data = tensor
    assert not torch.equal(given[0], given[1])


def test_other_optimizers_and_engines() -> None:
    """A step of the head alone does not count; one of an engine's copies does."""
    model = build("llava")
    handle, anchor = attached(model)
    start = weights(anchor.encoder)
    with torch.no_grad():
        for p in model.model.vision_tower.parameters():
            p.add_(1)
    for parameters, counts in (
        (list(handle.head.parameters()), False),
        ([nn.Parameter(torch.ones(3))], True),
    ):
        torch.optim.SGD(parameters, lr=0.1).step()
        anchor.average.update()
        same(anchor.encoder, moved(start, model.model.vision_tower) if counts else start)


def test_half_precision_does_not_round_the_moves_away() -> None:
    model = build("llava").bfloat16()
    tower = model.model.vision_tower
    _, anchor = attached(model, ema=0.999)
    start = weights(anchor.encoder)
    data = batch("llava")
    data.inputs["pixel_values"] = data.inputs["pixel_values"].bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    dtypes = []
    linear = next(m for m in anchor.encoder.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    for _ in range(3):
        model(**data.inputs).loss.backward()
        optimizer.step()
    anchor.average.update()
    found = list(anchor.encoder.parameters())
    assert {p.dtype for p in found} == {torch.float32}
    assert set(dtypes) == {torch.bfloat16}
    assert sum(not torch.equal(a, b) for a, b in zip(found, start, strict=True)) > 5
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}


def test_a_move_waits_for_nothing() -> None:
    model = build("llava")
    _, anchor = attached(model)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    with Waits() as waits:
        anchor.average.update()
    assert waits.found == []


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = build("llava")
    handle, anchor = attached(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**batch("llava").inputs).loss.backward()
    optimizer.step()
    wanted = moved(weights(anchor.encoder), model.model.vision_tower)
    handle.save(tmp_path)  # makes the last move first
    same(anchor.encoder, wanted)
    handle, anchor = attached(build("llava"))
    handle.load(tmp_path)
    same(anchor.encoder, wanted)
    plain = EncoderAnchor(build("llava").model.vision_tower, model, **SAME)
    with (
        apply_pre(build("llava"), anchor=plain) as other,
        pytest.raises(ValueError, match=r"holds .*'anchor.0.*this head has \['b1'"),
    ):
        other.load(tmp_path)


def test_a_trainer_resumes_it(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    ends = []
    for resume in (False, True):
        model = build("llava")
        torch.manual_seed(5)
        _, anchor = attached(model)
        with patch_trainer():
            trainer = make(tmp_path, model, max_steps=4, **saving)
            folder = str(tmp_path / "checkpoint-2") if resume else None
            trainer.train(resume_from_checkpoint=folder)
        ends.append(weights(anchor.average.update()))
    for straight, resumed in zip(*ends, strict=True):
        torch.testing.assert_close(resumed, straight)
    start = weights(build("llava").model.vision_tower)
    assert any(not torch.equal(a, b) for a, b in zip(start, ends[0], strict=True))


def test_removed_without_a_trace() -> None:
    model = build("llava")
    names = list(model.state_dict())
    model(**batch("llava").inputs)  # transformers adds hooks of its own
    hooks = len(_global_optimizer_pre_hooks)
    of_modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    handle, anchor = attached(model)
    assert [n for n in model.state_dict() if not n.startswith("pre_head.")] == names
    handle.remove()
    assert len(_global_optimizer_pre_hooks) == hooks
    start = weights(anchor.encoder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**batch("llava").inputs).loss.backward()
    optimizer.step()
    same(anchor.average.update(), start)
    assert list(model.state_dict()) == names
    assert [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    ] == of_modules


def sharded(how: str) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = build("llava")
    if how != "zero3":
        attached(model)
    data = batch("llava")
    if how == "fsdp2":
        fully_shard(model)
    elif how == "zero3":
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        deepspeed().zero.Init(module=model, config_dict_or_path=config)
    else:
        model = FullyShardedDataParallel(
            model, use_orig_params=how == "fsdp1", device_id=torch.device("cpu")
        )
    if how == "zero3":
        with pytest.raises(TypeError) as caught:
            EncoderAnchor(model.model.vision_tower, model, **SAME, ema=0.9)
        return str(caught.value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**data.inputs).loss.backward()
    with pytest.raises(TypeError) as caught:
        optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize("how", ["fsdp2", "fsdp1", "fsdp1, flat", "zero3"])
def test_sharded(how: str) -> None:
    if how == "zero3":
        need_deepspeed()
    for message in both(sharded, how):
        assert message == (
            "encoder: got CLIPVisionModel with sharded parameters, which ema cannot average; want "
            "them whole on each process (DDP, ZeRO-2), or ema=None"
        )


def replicated(how: str) -> Any:
    """By hand and of this rank: the average after two steps, with weights on every process."""
    model = build("llava")
    tower = model.model.vision_tower
    _, anchor = attached(model)
    if how == "zero2":
        wrapped = engine(model, 2, torch.optim.SGD, 0.5, accumulation=1)
        backward, step = wrapped.backward, wrapped.step
    else:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
        backward, step = torch.Tensor.backward, optimizer.step
    by_hand = weights(tower)
    for _ in range(2):
        data = batch("llava", seed=torch.distributed.get_rank())
        backward(wrapped(**data.inputs).loss)
        step()
        by_hand = moved(by_hand, tower)
    same(anchor.average.update(), by_hand)
    return by_hand


@pytest.mark.parametrize("how", ["ddp", "zero2"])
def test_replicated(how: str) -> None:
    if how == "zero2":
        need_deepspeed()
    zero, one = both(replicated, how)
    start = weights(build("llava").model.vision_tower)
    assert all(torch.equal(a, b) for a, b in zip(zero, one, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(zero, start, strict=True))


@pytest.mark.parametrize(
    ("ema", "error", "message"),
    [
        (0, ValueError, r"ema: got 0, want a number in \(0, 1\), or None"),
        (1.0, ValueError, "ema: got 1.0, want"),
        (-1, ValueError, "ema: got -1"),
        ("high", TypeError, "ema: got 'high'"),
        (True, TypeError, "ema: got True"),
    ],
)
def test_wrong_decays(ema: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attached(build("llava"), ema=ema)


def test_an_encoder_that_does_not_train() -> None:
    model = build("llava")
    model.model.vision_tower.requires_grad_(False)
    with pytest.raises(ValueError, match=r"ema: got 0.9 for an encoder that does not train"):
        attached(model)
