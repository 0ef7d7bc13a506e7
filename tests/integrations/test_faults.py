"""Faults during a training, injected: out of memory, interrupts, dying ranks.

Values that are not finite are in test_not_finite.py, broken checkpoints in test_checkpoint.py.
"""

from __future__ import annotations

import gc
import math
import os
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from pre_kernels.integrations import apply_pre, counting, patch_trainer
from pre_kernels.integrations.checkpoint import WEIGHTS
from pre_kernels.integrations.distributed import FullParameters
from pre_kernels.integrations.llava import PREPARE

from ..slow import thinned
from .support.by_hand import gradients
from .support.original_llava import build_original, original_batch
from .support.processes import both, join
from .support.ranks import made, shard
from .support.split_trainings import ddp_resumes, trained
from .support.tiny.models import batch, build
from .support.tiny.training import make


class Fault:
    """Raises once, in its call number `after`."""

    def __init__(self, error: BaseException, after: int = 0) -> None:
        self.error = error
        self.left = after

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == -1:
            error = self.error
            self.error = KeyError("called again")
            raise error


def in_a_layer(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    model.model.language_model.layers[3].register_forward_pre_hook(fault)


def in_the_head(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    # At that time the loss of the first head exists already.
    handle.head[1].register_forward_pre_hook(fault)


def after_us(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    model.register_forward_hook(fault)


def before_the_forward(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    model.register_forward_pre_hook(fault)


def in_a_kernels_buffer(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    new_empty = Tensor.new_empty
    patch.setattr(Tensor, "new_empty", lambda *args, **more: fault() or new_empty(*args, **more))


def in_the_backward(model: nn.Module, handle: Any, fault: Fault, patch: Any) -> None:
    def watch(module: nn.Module, args: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output).register_hook(fault)

    model.model.language_model.layers[2].register_forward_hook(watch)


def out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# (where, what, the number of calls that go well, the options, whether the forward had ended with
# PRe in its loss)
ENDS: list[tuple[Any, Callable[[], BaseException], int, dict[str, Any], bool]] = [
    (in_a_layer, out_of_memory, 0, {}, False),
    (in_the_head, out_of_memory, 0, {}, False),
    (in_a_kernels_buffer, out_of_memory, 0, {"impl": "triton"}, False),
    (in_a_kernels_buffer, out_of_memory, 7, {"impl": "triton"}, False),
    (in_the_backward, out_of_memory, 0, {}, True),
    (before_the_forward, lambda: KeyError("hook"), 0, {}, False),
    (after_us, lambda: KeyError("hook"), 0, {}, True),
    (in_a_layer, KeyboardInterrupt, 0, {}, False),
    (in_the_head, KeyboardInterrupt, 0, {}, False),
    (in_the_backward, KeyboardInterrupt, 0, {}, True),
]


def name(case: Any) -> str:
    return case.__name__ if callable(case) else str(case)


def step(model: nn.Module) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(**batch("llava").inputs).loss.backward()
    return gradients(model)


def fails(call: Callable[[], Any], error: type[BaseException]) -> None:
    """Unlike pytest.raises this keeps no traceback, because a traceback keeps the tensors of its
    frames."""
    try:
        call()
    except error:
        return
    raise AssertionError(f"no {error.__name__}")


@pytest.mark.parametrize(("place", "error", "after", "options", "counted"), ENDS, ids=name)
def test_the_step_after(
    place: Any, error: Any, after: int, options: Any, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the broken step is kept, and the next step is that of a model without the
    fault."""
    undisturbed = build("llava")
    apply_pre(undisturbed, [2, 3], **options)
    wanted = step(undisturbed)

    model = build("llava")
    seen = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    handle = apply_pre(model, [2, 3], **options)
    with monkeypatch.context() as patch:
        place(model, handle, Fault(error(), after), patch)
        fails(lambda: step(model), type(error()))
    interrupted = error is KeyboardInterrupt and not counted
    # torch then calls no hook, so the next forward of any kind, or `remove`, releases the capture.
    if interrupted:
        with torch.no_grad():
            model(**batch("llava").inputs)
    gc.collect()
    assert all(ref() is None for ref in seen)
    assert len(seen) >= (0 if place is before_the_forward else 3)
    assert handle._capture.seen is None
    assert not handle._capture.inside
    metrics = handle.metrics()
    assert metrics["pre_forwards"] == counted
    assert math.isfinite(metrics["pre_loss"]) == counted
    after_it = step(model)
    for parameter, gradient in wanted.items():
        assert gradient is None or torch.equal(after_it[parameter], gradient), parameter


def test_remove_lets_go_of_an_interrupted_forward() -> None:
    model = build("llava")
    seen = []
    handle = apply_pre(model)
    layer = model.model.language_model.layers[3]
    layer.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    layer.register_forward_pre_hook(Fault(KeyboardInterrupt()))
    fails(lambda: step(model), KeyboardInterrupt)
    handle.remove()
    gc.collect()
    assert seen[0]() is None


def test_an_interrupt_inside_the_original_llava() -> None:
    """Its merge is followed during a forward only once, however the previous forward ended."""
    model = build_original()
    data = original_batch()
    handle = apply_pre(model)
    wanted = model(**data).loss
    for _ in range(2):
        model.model.layers[3].register_forward_pre_hook(Fault(KeyboardInterrupt()))
        fails(lambda: model(**data), KeyboardInterrupt)
    assert model(**data).loss == wanted
    assert PREPARE not in vars(model)
    model.model.layers[3].register_forward_pre_hook(Fault(KeyboardInterrupt()))
    fails(lambda: model(**data), KeyboardInterrupt)
    handle.remove()
    assert PREPARE not in vars(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, out_of_memory], ids=name)
def test_a_training_that_was_ended_leaves_model_and_trainer(error: Any, tmp_path: Path) -> None:
    model, undisturbed = build("llava"), build("llava")
    handle = apply_pre(model)
    apply_pre(undisturbed).head.load_state_dict(handle.head.state_dict())
    # The fault comes in the second of the step's two forwards.
    model.model.language_model.layers[3].register_forward_pre_hook(Fault(error(), 1))
    with patch_trainer():
        trainer = make(tmp_path, model)
        fails(trainer.train, type(error()))
    assert "backward" not in vars(trainer.accelerator)
    assert "create_optimizer" not in vars(trainer)
    assert handle._deferred is None
    for gradient, wanted in zip(step(model).values(), step(undisturbed).values(), strict=True):
        assert wanted is None or torch.equal(gradient, wanted)


def ranks_that_die(folder: str, how: str) -> None:
    """Rank 1 does not take part in one of PRe's collectives. Rank 0 gets an error within the time
    limit of the group.

    "save": rank 1 is missing from the beginning. "gather": it is missing when the parts of the head
    are gathered.
    """
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    # On a busy machine the collectives in which both take part must also end within this time.
    limit = timedelta(seconds=5)
    join(store, rank, timeout=limit)
    model, handle = made(group="world")
    wanted = step(model) if how == "forward" else None  # both take part
    (Path(folder) / "whole").mkdir(exist_ok=True)
    if how in ("save", "gather", "load"):
        shard(model, False)
        handle.save(f"{folder}/whole")
    save = lambda: handle.save(f"{folder}/half")  # noqa: E731
    call = {"save": save, "gather": save, "load": lambda: handle.load(f"{folder}/whole")}.get(how)
    if rank == 1:
        if how == "gather":
            with mock.patch.object(FullParameters, "read", side_effect=out_of_memory()):
                fails(save, torch.OutOfMemoryError)
        if how == "exit":
            model.model.language_model.layers[3].register_forward_pre_hook(lambda *_: os._exit(3))
            model(**batch("llava").inputs)
        if how == "forward":
            model.model.language_model.layers[3].register_forward_pre_hook(Fault(out_of_memory()))
            fails(lambda: step(model), torch.OutOfMemoryError)
        while not os.path.exists(f"{folder}/over"):  # rank 1 is alive, but does something else
            time.sleep(0.05)
        torch.distributed.destroy_process_group()
        return
    start = time.monotonic()
    said = r"PRe: a sum over .* failed, because another process" if call is None else None
    with pytest.raises(RuntimeError, match=said):
        step(model) if call is None else call()
    assert time.monotonic() - start < 30
    Path(f"{folder}/over").touch()
    assert not os.path.exists(f"{folder}/half/{WEIGHTS}")
    torch.distributed.destroy_process_group()
    # Rank 0 continues alone. Both ranks had the same batch, so its own gradient is the mean over
    # both.
    if call is None:
        assert handle._capture.seen is None
        alone = step(model)
        assert wanted is None or all(
            g is None or torch.equal(alone[n], g) for n, g in wanted.items()
        )
        assert handle.metrics()["pre_forwards"] == (2 if how == "forward" else 1)


@pytest.mark.parametrize("how", thinned(["exit", "forward", "save", "gather", "load"], 5))
def test_a_rank_that_dies(how: str, tmp_path: Path) -> None:
    if how != "exit":
        both(ranks_that_die, str(tmp_path), how)
        return
    with pytest.raises(AssertionError, match=r"rank 0: returned\n--- rank 1: exit code 3"):
        both(ranks_that_die, str(tmp_path), how)


def stuck_before_the_count(folder: str) -> None:
    """Rank 1 loads data forever. Rank 0 gets an error within the time limit, which names it."""
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    # The ranks set a training up within this time too.
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    join(store, rank, timeout=timedelta(seconds=15))
    model = build("llava")
    apply_pre(model)
    options = {"size": 1, "ddp_backend": "gloo", "ddp_broadcast_buffers": False}
    over = Path(folder) / "over"

    def stuck(*_: Any) -> None:
        while not over.exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    with patch_trainer():
        trainer = make(Path(folder), model, **options)
        if rank == 1:
            with (
                mock.patch.object(counting.Counting, "begin", stuck),
                pytest.raises(KeyboardInterrupt),
            ):
                trainer.train()
            torch.distributed.destroy_process_group()
            return
        with pytest.raises(
            RuntimeError, match=r"(?s)PRe: a sum over .*ddp_timeout of TrainingArguments.*15000ms"
        ):
            trainer.train()
    over.touch()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_rank_that_is_stuck_before_the_count(tmp_path: Path) -> None:
    both(stuck_before_the_count, str(tmp_path))


@pytest.mark.slow
def test_two_processes_go_on_from_one(tmp_path: Path) -> None:
    """The reverse case is in test_two_processes.py."""
    trained(str(tmp_path / "one"), 1, None)
    head = load_file(tmp_path / "one" / "checkpoint-1" / WEIGHTS)
    found = both(ddp_resumes, str(tmp_path / "two"), 2, str(tmp_path / "one" / "checkpoint-1"))
    assert all(torch.equal(w1, head["w1"]) for w1 in found)
    assert not torch.equal(load_file(tmp_path / "two" / "last" / WEIGHTS)["w1"], head["w1"])


def test_going_on_with_a_watched_optimizer_after_remove(tmp_path: Path) -> None:
    """`remove` leaves nothing that needs the head. Functions that need it raise an error with the
    reason."""
    model = build("llava")
    inputs = batch("llava").inputs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = apply_pre(model)
    handle.watch(optimizer)
    handle.remove()
    model(**inputs).loss.backward()
    optimizer.step()
    assert "pre_head_grad_norm" not in handle.metrics()
    for needs in (
        lambda: handle.save(tmp_path),
        lambda: handle.load(tmp_path),
        handle.param_groups,
    ):
        with pytest.raises(RuntimeError, match=r"handle: it was removed"):
            needs()


class Removes(TrainerCallback):
    """Removes the handle after the first step."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.handle.remove()


def test_removed_in_the_middle_of_a_training(tmp_path: Path) -> None:
    model = build("llava")
    with patch_trainer():
        trainer = make(tmp_path, model, callbacks=[Removes(apply_pre(model))], max_steps=3)
        trainer.train()
    assert trainer.state.global_step == 3
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
