"""torch.distributed.checkpoint with the head in the state dict: by shards, in the background,
and resuming under another strategy on another number of ranks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from pre_kernels.integrations import EncoderAnchor, apply_pre
from pre_kernels.integrations.checkpoint import WEIGHTS

from .support.by_hand import assert_same_gradients
from .support.processes import both, every
from .support.ranks import need_deepspeed
from .support.resumable import RATE, Training, by_hand, part, whole, world
from .support.tiny.models import build

State = dict[str, Tensor]
# The tensors of a head and of its state in Adam.
OF_HEAD = 4 + 4 * 3


def unequal(first: State, second: State) -> list[str]:
    """The names of the tensors that are not the same, bit for bit."""
    assert first.keys() == second.keys()
    return [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


def goes_on(how: str, folder: str, **options: Any) -> list[State]:
    """The states of a training: when it was saved, when it was loaded, after the next step without
    an interruption and after that of the resumed one."""
    training = Training(how, **options)
    training.step(0)
    training.save(folder)
    saved = training.full()
    training.step(1)
    resumed = Training(how, resumes=True, **options)
    resumed.load(folder)
    loaded = resumed.full()
    resumed.step(1)
    return [saved, loaded, training.full(), resumed.full()]


@pytest.mark.parametrize(
    ("how", "layer"),
    [("fsdp2", 2), ("fsdp2 own", [1, 3]), ("ddp", 2), ("fsdp1", 2)],
    ids=["FSDP2", "FSDP2 with several heads", "DDP", "FSDP1"],
)
def test_the_next_step_is_that_of_an_uninterrupted_training(
    how: str, layer: Any, tmp_path: Path
) -> None:
    """Model, head and the state of the optimizer are bit-equal after loading, and after a step."""
    for saved, loaded, went_on, resumed in both(
        goes_on, how, str(tmp_path), timeout=300, layer=layer
    ):
        heads = 2 if layer == [1, 3] else 1
        assert len([name for name in saved if "pre_head." in name]) == heads * OF_HEAD
        assert not unequal(saved, loaded)
        assert not unequal(went_on, resumed)
        # Every parameter that is trained, and its state, was changed by the step.
        same = {name for name in saved if torch.equal(saved[name], went_on[name])}
        assert {name for name in same if "vision_tower" not in name} == set()


class Slow(FileSystemWriter):
    """A writer that begins after `go` is set."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.go = threading.Event()

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        assert self.go.wait(60)
        return super().write_data(*args, **kwargs)


def in_the_background(how: str, folder: str) -> list[State]:
    """The states at the call of `async_save`, of a training that resumes from what was written,
    and of both after the next step."""
    group = torch.distributed.new_group(backend="gloo")
    training = Training(how)
    training.step(0)
    model, optimizer = get_state_dict(training.wrapped, training.optimizer)
    saved = training.full()
    writer = Slow(folder)
    future = dcp.async_save(
        {"model": model, "optimizer": optimizer}, storage_writer=writer, process_group=group
    )
    training.step(1)
    went_on = training.full()
    assert not future.done()
    writer.go.set()
    future.result(60)
    resumed = Training(how, resumes=True)
    resumed.load(folder)
    loaded = resumed.full()
    resumed.step(1)
    torch.distributed.destroy_process_group(group)
    return [saved, loaded, went_on, resumed.full()]


@pytest.mark.parametrize("how", ["fsdp2", pytest.param("fsdp1", marks=pytest.mark.slow)])
def test_async_save_writes_the_state_at_the_call(how: str, tmp_path: Path) -> None:
    """The training takes a step before the first byte is written. Writing has a group of its own,
    because its collectives would be mixed up with those of the training."""
    for saved, loaded, went_on, resumed in both(in_the_background, how, str(tmp_path)):
        assert not unequal(saved, loaded)
        assert unequal(saved, went_on)
        assert not unequal(went_on, resumed)


def without_the_head(folder: str) -> tuple[State, State, State]:
    """Save a model without its head, and load it into one with a head. Returns the states before
    and after, and the head that the other began with."""
    training = Training("fsdp2")
    training.step(0)
    before = whole(training.wrapped)
    with training.handle.excluded():
        model = get_model_state_dict(training.wrapped)
    dcp.save({"model": model}, checkpoint_id=f"{folder}/model")
    training.handle.save(f"{folder}/head")
    assert set(before) - set(model) == {f"pre_head.{n}" for n in ("w1", "b1", "w2", "b2")}

    resumed = Training("fsdp2", resumes=True)
    state = {"model": get_model_state_dict(resumed.wrapped)}
    with pytest.raises(
        CheckpointException, match=r"Missing key in checkpoint state_dict: model\.pre_head\."
    ):
        dcp.load(state, checkpoint_id=f"{folder}/model")
    fresh = {n: t for n, t in whole(resumed.wrapped).items() if n.startswith("pre_head.")}
    with resumed.handle.excluded():
        state = {"model": get_model_state_dict(resumed.wrapped)}
    dcp.load(state, checkpoint_id=f"{folder}/model")
    result = set_model_state_dict(
        resumed.wrapped, state["model"], options=StateDictOptions(strict=False)
    )
    assert {name.split(".")[0] for name in result.missing_keys} == {"pre_head"}
    halfway = whole(resumed.wrapped)
    assert not unequal(fresh, {n: halfway[n] for n in fresh})
    resumed.handle.load(f"{folder}/head")
    return before, halfway, whole(resumed.wrapped)


def test_checkpoints_without_the_head(tmp_path: Path) -> None:
    """`excluded` leaves it out. DCP names the missing keys if a model with a head is to be loaded
    from there; with `excluded` all but the head is loaded, and `handle.load` adds the head."""
    for before, halfway, after in both(without_the_head, str(tmp_path)):
        assert all(name.startswith("pre_head.") for name in unequal(before, halfway))
        assert not unequal(before, after)


def saved_by(how: str, folder: str) -> State:
    training = Training(how)
    training.step(0)
    training.save(folder)
    training.handle.save(f"{folder}/head", model=training.wrapped)
    state = training.full()
    if world()[0] == 0:
        model = {n: t for n, t in state.items() if "/" not in n and "pre_head" not in n}
        torch.save(model, f"{folder}/model.pt")
    torch.distributed.barrier()
    return state


def resumed_by(how: str, folder: str) -> tuple[State, Tensor, dict[str, Tensor | None]]:
    """What was loaded, and the loss and the gradients of the next step."""
    training = Training(how, resumes=True)
    training.load(folder)
    loaded = training.full()
    return loaded, training.backward(1), training.gradients()


ELSEWHERE = [
    ("fsdp2", "plain", 1),
    ("fsdp2", "fsdp2", 4),
    ("fsdp2", "hsdp", 4),
    ("fsdp2", "ddp", 2),
    ("ddp", "fsdp2", 4),
    ("ddp", "plain", 1),
    ("fsdp1", "fsdp2", 4),
    ("fsdp1", "plain", 1),
]


@pytest.mark.parametrize(
    ("before", "how", "count"),
    [
        pytest.param(*row, id="{}-{}-{}".format(*row), marks=[pytest.mark.slow] * (place > 0))
        for place, row in enumerate(ELSEWHERE)
    ],
)
def test_resuming_elsewhere(before: str, how: str, count: int, tmp_path: Path) -> None:
    """Two ranks save. Under another strategy, on another number of ranks, all tensors are loaded
    bit for bit, and the next step has the gradients that one process computes by hand."""
    folder = str(tmp_path)
    saved = both(saved_by, before, folder)[0]
    ranks = (
        [resumed_by(how, folder)]
        if count == 1
        else every(count, resumed_by, how, folder, timeout=300)
    )
    loss, wanted = by_hand(saved, 1, count)
    for loaded, _, gradients in ranks:
        assert not unequal(saved, loaded)
        assert_same_gradients(gradients, wanted)
    torch.testing.assert_close(sum(rank[1] for rank in ranks) / count, loss)


def zero_resumed(how: str, folder: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The weights are given to DeepSpeed with the model, the head is loaded into the engine."""
    training = Training(how, resumes=True, weights=f"{folder}/model.pt")
    training.handle.load(f"{folder}/head")
    training.handle.save(f"{folder}/again")
    return training.backward(1), training.gradients()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), [("zero2", 2), ("zero3", 4)])
def test_zero_resumes_from_shards(how: str, count: int, tmp_path: Path) -> None:
    """DeepSpeed cannot load DCP's files: the model's whole weights and the head's files can be
    loaded under any number of ranks."""
    need_deepspeed()
    saved = both(saved_by, "fsdp2", str(tmp_path))[0]
    ranks = every(count, zero_resumed, how, str(tmp_path), timeout=300)
    head = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(tensor, saved[f"pre_head.{name}"]) for name, tensor in head.items())
    loss, wanted = by_hand(saved, 1, count)
    for _, gradients in ranks:
        assert_same_gradients(gradients, wanted)
    torch.testing.assert_close(sum(rank[0] for rank in ranks) / count, loss)


def averaged(seed: int) -> tuple[Any, EncoderAnchor, Any]:
    """A model with PRe towards the moving average of its own vision tower."""
    model = build("llava", seed)
    anchor = EncoderAnchor(
        model.model.vision_tower, model, ema=0.5, image_mean=None, image_std=None
    )
    handle = apply_pre(model, anchor=anchor)
    model(**part(0, 0, 1).inputs).loss.backward()
    # An optimizer would have no state of the tower's last layer, which gets no gradient.
    trained = [p for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return handle, anchor, torch.optim.AdamW(trained, lr=RATE)


def test_moving_averages_are_in_the_heads_files(tmp_path: Path) -> None:
    """They are not in the state dict. `handle.load` comes last: `get_state_dict` steps a new
    optimizer, which moves the average."""

    def step(handle: Any, optimizer: Any) -> None:
        handle.model(**part(0, 0, 1).inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def everything(handle: Any, anchor: EncoderAnchor, optimizer: Any) -> State:
        means = {f"mean.{n}": p.clone() for n, p in anchor.encoder.named_parameters()}
        return whole(handle.model, optimizer) | means

    handle, anchor, optimizer = averaged(0)
    step(handle, optimizer)
    model, moments = get_state_dict(handle.model, optimizer)
    dcp.save({"model": model, "optimizer": moments}, checkpoint_id=tmp_path)
    handle.save(tmp_path)
    step(handle, optimizer)
    wanted = everything(handle, anchor, optimizer)

    handle, anchor, optimizer = averaged(7)
    model, moments = get_state_dict(handle.model, optimizer)
    dcp.load({"model": model, "optimizer": moments}, checkpoint_id=tmp_path)
    set_state_dict(handle.model, optimizer, model_state_dict=model, optim_state_dict=moments)
    handle.load(tmp_path)
    step(handle, optimizer)
    assert not unequal(everything(handle, anchor, optimizer), wanted)
