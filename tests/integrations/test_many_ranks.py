"""Ranks with very different numbers of visual tokens: the gradient is that of the whole batch, and
counting costs one number, for which no forward waits."""

from __future__ import annotations

import collections
import contextlib
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from pre_kernels.integrations import apply_pre, counting, patch_trainer

from .support.by_hand import assert_same_gradients, gradients
from .support.collectives import Collectives
from .support.processes import both, every
from .support.ranks import UNEVEN, batches, by_hand, check, made, steps
from .support.tiny.models import batch, build
from .support.tiny.training import (
    UNEQUAL_IMAGES,
    InOrder,
    Recorder,
    Samples,
    arguments,
    collate,
    make,
)
from .support.tiny.training import by_hand as pre_alone

# Images have 4 tokens each. One entry for each rank.
IMAGES = [0, 1000, 1, 0, 37, 250, 0, 3]


def with_images(count: int) -> Any:
    return [("text", 3), *[("image", 8, 8)] * count, ("text", 5)]


# One forward for each of eight ranks, and two micro-batches of the eight.
FORWARDS = [[with_images(count)] for count in IMAGES]
SAMPLES = [with_images(count) for count in [*IMAGES, *IMAGES[::-1]]]


def own_loop() -> Any:
    model, _ = made(group="world")
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    return steps(wrapped, FORWARDS), gradients(model)


def test_eight_uneven_ranks() -> None:
    check(every(8, own_loop), by_hand(FORWARDS, forwards=1))


def trained(
    samples: list[Any], folder: str, layers: list[int] | None, callbacks: Any = (), **more: Any
) -> dict[str, torch.Tensor]:
    """The gradients of a step of two micro-batches, with PRe if there are `layers`."""
    model = build("llava")
    recorder = Recorder()
    with patch_trainer() if layers else contextlib.nullcontext():
        if layers:
            apply_pre(model, layer=layers[0] if len(layers) == 1 else layers)
        options = {"per_device_train_batch_size": 1, "ddp_backend": "gloo"}
        InOrder(
            model=model,
            args=arguments(Path(folder), 2, 1, **options, **more),
            train_dataset=Samples(samples),
            data_collator=collate("llava", samples),
            callbacks=[recorder, *callbacks],
        ).train()
    return recorder.steps[0]


def with_and_without(folder: str) -> Any:
    found = [trained(SAMPLES, folder, layers) for layers in ([2], None)]
    return found if torch.distributed.get_rank() in (0, 7) else None


@pytest.mark.slow
def test_the_trainer_on_eight_uneven_ranks(tmp_path: Path) -> None:
    """PRe adds the gradient of one process on all samples to what the Trainer has without it."""
    tokens = sum(int(batch("llava", [sample]).visual.sum()) for sample in SAMPLES)
    assert tokens == 8 * sum(IMAGES)
    weights = [1 / tokens] * len(SAMPLES)
    wanted = pre_alone("llava", SAMPLES, apply_pre(build("llava")), weights, "sum")
    results = every(8, with_and_without, str(tmp_path))
    for found, plain in (results[0], results[7]):
        added = {n: g - plain[n] if n in plain else g for n, g in found.items()}
        zero = {n: torch.zeros_like(g) for n, g in added.items() if n not in wanted}  # above it
        assert_same_gradients(added, zero | wanted, rtol=1e-3, atol=1e-6)


def collectives_of_a_step(folder: str, layers: list[int] | None) -> Any:
    """Those of the step, and those after it, at the log. Before the training the ranks compare
    their settings."""

    class Logs(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin = len(watched.found)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.end = len(watched.found)

    logs = Logs()
    with Collectives() as watched:
        trained(UNEQUAL_IMAGES, folder, layers, [logs], ddp_find_unused_parameters=True)
    return watched.found[logs.begin : logs.end], watched.found[logs.end :]


@pytest.mark.parametrize("layers", [[2], [1, 2, 3]], ids=["one layer", "three layers"])
def test_the_trainer_adds_one_number_to_a_step(layers: list[int], tmp_path: Path) -> None:
    """DDP takes the head's gradients along with the others, so their bucket is larger."""
    for found, plain in zip(
        both(collectives_of_a_step, str(tmp_path), layers),
        both(collectives_of_a_step, str(tmp_path), None),
        strict=True,
    ):
        kinds = [
            [collections.Counter(kind for kind, _ in part) for part in p] for p in (found, plain)
        ]
        for more, less in zip(*kinds, strict=True):
            assert more - less == {"allreduce_": 1}
        assert ("allreduce_", 1) in found[0]
        assert ("allreduce_", 1) not in plain[0]


def collectives_of_a_forward(layer: Any) -> Any:
    data = batches(UNEVEN, torch.distributed.get_rank())[0]
    model, _ = made(layer=layer, group="world")
    model(**data.inputs)  # In the first forward the ranks compare their settings.
    with Collectives() as watched:
        model(**data.inputs).loss.backward()
    return watched.found


@pytest.mark.parametrize("layer", [2, [1, 2, 3]], ids=["one layer", "three layers"])
def test_a_group_adds_one_number_to_a_forward(layer: Any) -> None:
    assert both(collectives_of_a_forward, layer) == [[("allreduce_", 1)]] * 2


def goes_ahead(folder: str) -> Any:
    """Rank 1 begins to count when rank 0 has computed its last layer."""
    reached = Path(folder) / "reached"
    rank = torch.distributed.get_rank()
    begin = counting.Counting.begin

    def late(self: Any, samples: list[Any]) -> None:
        while not reached.exists():
            time.sleep(0.01)
        begin(self, samples)

    model = build("llava")
    handle = apply_pre(model)
    if rank == 0:
        last = model.model.language_model.layers[-1]
        last.register_forward_hook(lambda *_: reached.touch())
    with patch_trainer(), mock.patch.object(counting.Counting, "begin", late if rank else begin):
        trainer = make(
            Path(folder),
            model,
            samples=UNEQUAL_IMAGES,
            size=1,
            ddp_backend="gloo",
            ddp_broadcast_buffers=False,
        )
        trainer.train()
    return handle.contributed


def test_no_forward_waits_for_the_count(tmp_path: Path) -> None:
    assert both(goes_ahead, str(tmp_path)) == [True, True]
