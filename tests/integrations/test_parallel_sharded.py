"""FSDP1, FSDP2 and ZeRO on two processes: loss and every gradient are those that one process
computes by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pre_kernels.integrations import EncoderAnchor, apply_pre

from .support.by_hand import copy_of, gradients, pre_loss, watch
from .support.processes import both
from .support.ranks import (
    DUMMY,
    TEXT,
    TEXT_ONLY,
    TWO_IMAGES,
    UNEVEN,
    batches,
    by_hand,
    check,
    config,
    deepspeed,
    fully_sharded,
    made,
    need_deepspeed,
    need_zero_init,
    shard,
    steps,
    whole_gradients,
    zero_steps,
)
from .support.tiny.models import IMAGE, build


def fsdp2(samples: list[Any], own: bool, frozen: bool) -> Any:
    model, _ = made(frozen, group="world")
    shard(model, own)
    losses = steps(model, samples)
    return losses, whole_gradients(model)


@pytest.mark.parametrize("own", [False, True], ids=["under the root", "a group of its own"])
@pytest.mark.parametrize("samples", [UNEVEN, TEXT_ONLY], ids=["uneven", "text-only"])
def test_fsdp2(own: bool, samples: list[Any]) -> None:
    # Otherwise FSDP2 reduces sets of gradients that differ between ranks, with and without PRe.
    frozen = samples is TEXT_ONLY
    check(both(fsdp2, samples, own, frozen), by_hand(samples, frozen=frozen))


def fsdp2_from_meta() -> Any:
    """The model is made on the meta device, sharded, then materialised, with
    head.reset_parameters() under a common seed."""
    source, _ = made()
    with torch.device("meta"):
        model = type(source)(source.config)
    handle = apply_pre(model.train())
    assert {p.device.type for p in handle.head.parameters()} == {"meta"}
    shard(model, False).to_empty(device="cpu")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    plain = {n: p for n, p in source.state_dict().items() if not n.startswith("pre_head")}
    set_model_state_dict(model, plain, options=StateDictOptions(full_state_dict=True, strict=False))
    for name, buffer in model.named_buffers():
        buffer.copy_(source.get_buffer(name))
    torch.manual_seed(5)
    handle.head.reset_parameters()
    head = {n: p.full_tensor() for n, p in handle.head.named_parameters()}
    source.pre_head.load_state_dict(head)
    data = batches(UNEVEN, 0)[0]
    return model(**data.inputs).loss.detach(), source(**data.inputs).loss.detach(), head


def test_fsdp2_from_the_meta_device() -> None:
    zero, one = both(fsdp2_from_meta)
    for sharded, plain, head in (zero, one):
        torch.testing.assert_close(sharded, plain)
        assert 0.1 < head["w1"].abs().max() <= 32**-0.5
        assert all(torch.equal(head[n], zero[2][n]) for n in head)


def seven_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """All visual tokens but the first belong to image 1. Their weight, 1 / 7, is not a bfloat16
    number."""
    visual = inputs["input_ids"] == IMAGE
    return (visual & (visual.cumsum(1) > 1)).long()


def fsdp2_that_casts() -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    data = batches([[TWO_IMAGES]] * 2, 0)[0]
    pairs = []
    for sharded in (False, True):
        model, handle = made(layer=[1, 2], weighting="image", mask_fn=seven_tokens)
        model.bfloat16()
        data.inputs["pixel_values"] = data.inputs["pixel_values"].bfloat16()
        for head in handle.head if sharded else []:
            fully_shard(head, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with handle.defer(torch.tensor(1154.9)) as deferred:
            model(**data.inputs)
        term = deferred.take()
        term.backward()
        pairs.append((term.detach(), model.model.language_model.layers[0].mlp.up_proj.weight.grad))
    return pairs


def test_fsdp2_does_not_cast_divisor_and_weights() -> None:
    for plain, sharded in both(fsdp2_that_casts):
        torch.testing.assert_close(sharded, plain, rtol=0, atol=0)


def fsdp1(samples: list[Any], own: bool) -> Any:
    wrapped = fully_sharded(made(group="world")[0], own)
    return steps(wrapped, samples), whole_gradients(wrapped)


@pytest.mark.parametrize("own", [False, True], ids=["under the root", "a unit of its own"])
def test_fsdp1(own: bool) -> None:
    check(both(fsdp1, TEXT_ONLY, own), by_hand(TEXT_ONLY))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": lambda model: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True),
    "FSDP1, under the root": lambda model: fully_sharded(model, False),
    "FSDP1, a unit of its own": lambda model: fully_sharded(model, True),
    "FSDP2, under the root": lambda model: shard(model, False),
    "FSDP2, a group of its own": lambda model: shard(model, True),
}


def wrapped_training(how: str) -> Any:
    """(the names in each of the head's groups, made after wrapping, and the norm of its gradient at
    the step)."""
    model, handle = made(group="world", head_weight_decay=0.1)
    wrapped = WRAPPERS[how](model)
    names = {id(p): n for n, p in handle.head.named_parameters()}
    groups = handle.param_groups()
    optimizer = torch.optim.SGD(groups, lr=0.0)
    handle.watch(optimizer)
    steps(wrapped, UNEVEN)
    optimizer.step()
    alone = handle.metrics(reset=False).get("pre_head_grad_norm")
    norm = handle.metrics(combine=summed)["pre_head_grad_norm"]
    return [([names[id(p)] for p in g["params"]], g["weight_decay"]) for g in groups], norm, alone


def summed(totals: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(totals)
    return totals


@pytest.mark.parametrize("how", WRAPPERS)
def test_groups_and_norm(how: str) -> None:
    """Each process has all parameters, or parts of them; under FSDP1 flat ones, or none."""
    _, wanted = by_hand(UNEVEN)
    norm = float(
        torch.cat([g.flatten() for n, g in wanted.items() if n.startswith("pre_head")]).norm()
    )
    for groups, total_norm, alone in both(wrapped_training, how):
        assert [({n.split(".")[-1] for n in names}, decay) for names, decay in groups] == [
            ({"w1", "w2"}, 0.1),
            ({"b1", "b2"}, 0.0),
        ]
        assert total_norm == pytest.approx(norm, rel=1e-4)
        assert alone is None or alone == pytest.approx(norm, rel=1e-4)  # never the norm of a part


def attach_late(how: str) -> None:
    model = build("llava")
    if how == "FullyShardedDataParallel":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        model = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(
        TypeError,
        match=rf"model: got .* with {how} around or inside; want the plain model: call apply",
    ):
        apply_pre(model)
    assert not hasattr(model, "pre_head")


@pytest.mark.parametrize("how", ["FullyShardedDataParallel", "DistributedDataParallel"])
def test_attached_after_wrapping(how: str) -> None:
    both(attach_late, how)


def zero(samples: list[Any], stage: int, frozen: bool = False) -> Any:
    deepspeed()
    return zero_steps(made(frozen, group="world")[0], samples, stage)


@pytest.mark.parametrize(
    ("stage", "samples"), [(2, UNEVEN), (2, TEXT_ONLY), (3, UNEVEN), (3, DUMMY)]
)
def test_zero(stage: int, samples: list[Any]) -> None:
    need_deepspeed()
    # Otherwise ZeRO-2 also reduces sets of gradients that differ between ranks.
    frozen = samples is TEXT_ONLY
    check(both(zero, samples, stage, frozen), by_hand(samples, frozen=frozen))


def test_zero3_text_only() -> None:
    """The vision tower runs on both ranks, because ZeRO-3 waits forever if only one rank skips it,
    with and without PRe."""
    need_deepspeed()
    samples = [[TEXT], [TEXT]]
    check(both(zero, samples, 3), by_hand(samples, forwards=1))


def zero_init(folder: str, samples: list[Any]) -> Any:
    """The model is loaded under zero.Init, like from_pretrained does under the Trainer. The head is
    made afterwards."""
    deepspeed()
    from transformers import LlavaForConditionalGeneration
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(config(3))
    model = LlavaForConditionalGeneration.from_pretrained(folder).train()
    assert {p.shape for p in model.parameters()} == {(0,)}
    torch.manual_seed(7)
    apply_pre(model, group="world")
    assert model.pre_head.w1.shape == (32, 32)
    head = {n: p.detach().clone() for n, p in model.pre_head.named_parameters()}
    losses_and_grads = zero_steps(model, samples, 3)
    del alive
    return losses_and_grads, head


def test_zero3_init(tmp_path: Path) -> None:
    need_zero_init()
    model, handle = made()
    build("llava").save_pretrained(tmp_path)
    zero, other = both(zero_init, str(tmp_path), UNEVEN)
    torch.manual_seed(7)
    handle.head.reset_parameters()
    assert all(torch.equal(p, zero[1][n]) for n, p in handle.head.named_parameters())
    # by_hand has another head, so the whole step is done here.
    head = copy_of(handle.head)
    handle.remove()
    seen = watch(model, "llava")
    losses = []
    for number in range(2):
        data = [batches(UNEVEN, rank)[number] for rank in range(2)]
        count = sum(int(d.visual.sum()) for d in data)
        parts = [
            model(**d.inputs).loss / 2 + 0.5 * pre_loss(seen, d, [2], head, reduction="sum") / count
            for d in data
        ]
        (sum(parts) / 2).backward()
        losses.append(sum(parts).detach())
    check(
        [zero[0], other[0]],
        (losses, gradients(model) | {f"pre_head.{n}": p.grad for n, p in head.items()}),
    )


def towards(encoder: nn.Module, model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    apply_pre(model, anchor=EncoderAnchor(encoder, model, image_mean=None, image_std=None))
    return model


def zero_encoder(folder: str) -> Any:
    deepspeed()
    from transformers import Dinov2Model
    from transformers.integrations import HfDeepSpeedConfig

    model = build("llava")
    alive = HfDeepSpeedConfig(config(3))
    encoder = Dinov2Model.from_pretrained(folder)
    assert {p.shape for p in encoder.parameters()} == {(0,)}
    losses, _ = zero_steps(towards(encoder, model), UNEVEN, 3)
    del alive
    return losses, dict(encoder.named_parameters())


def test_an_encoder_that_zero3_has_split(tmp_path: Path) -> None:
    need_zero_init()
    from transformers import Dinov2Config, Dinov2Model

    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 8,
        "patch_size": 4,
    }
    encoder = Dinov2Model(Dinov2Config(num_hidden_layers=2, **sizes))
    encoder.save_pretrained(tmp_path)
    ranks = both(zero_encoder, str(tmp_path))
    model = towards(encoder, build("llava"))
    for rank, (losses, parameters) in enumerate(ranks):
        torch.testing.assert_close(parameters, dict(encoder.named_parameters()), rtol=0, atol=0)
        for data, loss in zip(batches(UNEVEN, rank), losses, strict=True):
            torch.testing.assert_close(loss, model(**data.inputs).loss.detach())
