"""DDP on two processes, and groups: loss and every averaged gradient are those that one process
computes by hand."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pre_kernels.integrations import apply_pre, output

from .support.by_hand import gradients
from .support.processes import both
from .support.ranks import TEXT_ONLY, UNEVEN, batches, by_hand, check, made, steps
from .support.tiny.models import build


def ddp(samples: list[Any], apply: dict[str, Any], frozen: bool, **options: Any) -> Any:
    model, _ = made(frozen, **apply)
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    return steps(
        wrapped, samples, None if options.get("static_graph") else wrapped.no_sync
    ), gradients(model)


@pytest.mark.parametrize("samples", [UNEVEN, TEXT_ONLY], ids=["uneven", "text-only"])
@pytest.mark.parametrize("level", ["patch", "image"])
def test_ddp_with_group(samples: list[Any], level: str) -> None:
    """Accumulation under no_sync, where every parameter may be unused on a rank."""
    found = both(
        ddp, samples, {"group": "world", "level": level}, False, find_unused_parameters=True
    )
    check(found, by_hand(samples, level=level))


def test_ddp_without_group_is_the_mean_of_the_ranks_means() -> None:
    found = both(ddp, TEXT_ONLY, {}, False, find_unused_parameters=True)
    check(found, by_hand(TEXT_ONLY, group=False))


@pytest.mark.parametrize(
    ("forwards", "options"), [(2, {}), (1, {}), (1, {"static_graph": True})], ids=str
)
def test_ddp_finds_the_head_on_a_text_only_rank(forwards: int, options: dict[str, Any]) -> None:
    """In the forward after which DDP averages, it waits for every trainable parameter of each
    rank."""
    samples = [r[:forwards] for r in TEXT_ONLY]
    found = both(ddp, samples, {"group": "world"}, True, timeout=60, **options)
    check(found, by_hand(samples, frozen=True, forwards=forwards))


def subgroups() -> Any:
    """A group of one process counts only its own terms."""
    groups = [torch.distributed.new_group([rank]) for rank in range(2)]
    model, handle = made(group=groups[torch.distributed.get_rank()])
    alone, _ = made()
    data = batches(UNEVEN, torch.distributed.get_rank())[0]
    assert model(**data.inputs).loss == alone(**data.inputs).loss
    copy.deepcopy(model)(**data.inputs)  # like EMA
    with pytest.raises(
        TypeError, match=r"group: got .*, want a ProcessGroup that this process is in"
    ):
        made(group=groups[1 - torch.distributed.get_rank()])
    return handle.metrics()


def test_a_process_group() -> None:
    zero, one = both(subgroups)
    assert (zero["pre_rows"], one["pre_rows"]) == (8, 4)


def test_group_of_one_process() -> None:
    """The group "world" works without torch.distributed, so scripts also run without torchrun."""
    data = batches(UNEVEN, 0)[0]
    assert made(group="world")[0](**data.inputs).loss == made()[0](**data.inputs).loss


@pytest.mark.parametrize("group", ["all", 2, object()])
def test_bad_group(group: Any) -> None:
    model = build("llava")
    with pytest.raises(TypeError, match=r"group: got .*want a ProcessGroup"):
        apply_pre(model, group=group)
    assert not hasattr(model, "pre_head")


def group_metrics() -> Any:
    model, handle = made(group="world")
    alone, own = made()
    data = batches(UNEVEN, torch.distributed.get_rank())[0]
    for m in (model, alone):
        m(**data.inputs)
    return handle.metrics(), own.metrics()


def test_group_does_not_change_the_metrics() -> None:
    for found, wanted in both(group_metrics):
        assert found == pytest.approx(wanted, rel=1e-5)


def item_shares() -> Any:
    """With num_items_in_batch over all processes a trainer multiplies the loss by the world size
    and averages gradients."""
    rank = torch.distributed.get_rank()
    data = [batches(UNEVEN, r)[0] for r in range(2)]
    # As if the step had two micro-batches.
    items = 2 * sum(int(d.inputs["labels"][:, 1:].ne(-100).sum()) for d in data)
    model, _ = made(group="world")
    (2 * model(**data[rank].inputs, num_items_in_batch=torch.tensor(items)).loss).backward()
    gradient = model.pre_head.w1.grad
    torch.distributed.all_reduce(gradient)
    return gradient / 2


def test_group_and_the_share_of_a_trainers_items() -> None:
    _, wanted = by_hand([r[:1] for r in UNEVEN], forwards=1)
    for found in both(item_shares):
        torch.testing.assert_close(found, wanted["pre_head.w1"] / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["dict", "object", "tuple", "no logits"])
def test_the_term_is_kept_in_the_graph_of_the_logits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the output has no loss, the term is put into the graph without a copy, and gradients do
    not change."""
    monkeypatch.setattr(output, "initialized", lambda: True)
    source = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    term = torch.ones((), requires_grad=True)
    logits = source * 2
    kinds: dict[str, Any] = {
        "dict": {"logits": logits},
        "object": SimpleNamespace(logits=logits),
        "tuple": (logits, "cache"),
        "no logits": {"last_hidden_state": logits},
    }
    model_output = output.keep_in_graph(kinds[kind], term)
    assert type(model_output) is type(kinds[kind])
    if kind == "no logits":
        assert model_output == {"last_hidden_state": logits}
        return
    (tied,) = output.logits(model_output)
    assert tied.data_ptr() == logits.data_ptr()
    assert kind != "tuple" or model_output[1] == "cache"
    tied[:, 1:].mul_(2).div_(2)  # a temperature, applied in place
    tied.float().square().sum().backward()
    assert torch.equal(source.grad, 8 * source)
    assert term.grad == 0
