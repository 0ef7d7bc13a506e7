"""Terms counted ahead of a step, if the forwards have other terms, if they cannot be counted, and
if nobody asks for them.

The expected values are by hand: the mean over the visual tokens of the step, or that of the
micro-batches' own means.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pre_kernels.integrations import apply_pre, find_handle, patch_trainer

from .support.counting import of_the_step, only, own_means, run
from .support.processes import both
from .support.tiny.models import IMAGE, build
from .support.tiny.training import UNEQUAL_IMAGES, InOrder, Samples, arguments, assert_head, collate
from .support.waits import Waits
from .support.warned import pre_warnings


class PixelsLater(InOrder):
    """Its batches have no pixels until `compute_loss`, as if images were read or encoded there."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, items = super().get_batch_samples(*args, **kwargs)
        self.pixels = [sample.pop("pixel_values", None) for sample in samples]
        return samples, items

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        pixels = self.pixels.pop(0)
        return super().compute_loss(
            model, inputs | ({} if pixels is None else {"pixel_values": pixels}), *args, **kwargs
        )


def test_inputs_that_are_made_after_counting(tmp_path: Path) -> None:
    """The count is 0. Without a check in the forward the gradient would be N times too large."""
    steps, handle, said = run(PixelsLater, tmp_path)
    for step in steps:
        assert_head(step, own_means(handle))
    only(
        said,
        r"0 visual tokens .* were counted ahead in the batches since the last log, "
        r"and the forwards had 16: ",
    )


def test_inputs_that_are_made_after_counting_before_a_log_that_comes_late(tmp_path: Path) -> None:
    """Until the warning is given, each micro-batch is checked on the device."""
    steps, handle, said = run(PixelsLater, tmp_path, logging_steps=3)
    for step in steps:
        assert_head(step, own_means(handle))
    only(said, r"0 visual tokens .* and the forwards had 48: ")


class Twice(InOrder):
    """One loss from two forwards of a batch, as in R-Drop."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        losses = [super(Twice, self).compute_loss(model, inputs, *args, **kwargs) for _ in range(2)]
        return torch.stack(losses).mean()


class Adversarial(InOrder):
    """A second forward and backward of each batch, whose gradients are added."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        again = self.compute_loss(model, inputs)
        self.accelerator.backward(again)
        return loss


@pytest.mark.parametrize(
    ("kind", "times"), [(Twice, 1.0), (Adversarial, 2.0)], ids=["in one loss", "in two"]
)
def test_two_forwards_of_a_batch(kind: type, times: float, tmp_path: Path) -> None:
    """One backward pass gives the mean over its forwards. Two backward passes each add their own
    mean, because the model's loss is also added twice."""
    steps, handle, said = run(kind, tmp_path)
    assert_head(steps[1], own_means(handle, times=times))
    assert_head(steps[2], own_means(handle, times=times))
    assert_head(steps[0], own_means(handle) if kind is Twice else of_the_step(handle, times=2.0))
    only(said, r"16 visual tokens .* counted ahead .* and the forwards had 32: ")


class Halves(InOrder):
    """One backward pass for each sample of a micro-batch, to save memory."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        parts = [collate("llava", UNEQUAL_IMAGES)([i]) for i in self.indices.pop(0)]
        return sum(
            super(Halves, self).training_step(model, part, *args, **kwargs) for part in parts
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.indices = [[0, 1], [2, 3]]
        return super().get_batch_samples(*args, **kwargs)


def test_a_micro_batch_in_parts(tmp_path: Path) -> None:
    steps, handle, said = run(Halves, tmp_path)
    for step in steps:
        assert_head(step, of_the_step(handle))
    assert said == []


class Skips(InOrder):
    """Leaves out the second micro-batch and returns another loss for it, like trainers that skip a
    loss of nan."""

    seen = 0

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        targets = inputs["labels"][:, 1:].flatten()
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        if self.seen == 2:
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach()
        return super().training_step(model, inputs, *args, **kwargs)


def test_a_micro_batch_that_is_left_out(tmp_path: Path) -> None:
    steps, handle, said = run(Skips, tmp_path)
    for step in steps[1:]:
        assert_head(step, of_the_step(handle))
    assert said == []


@pytest.mark.parametrize("on", [(False, True, True), (True, False, True)])
def test_turned_on_and_off_between_steps(on: tuple[bool, ...], tmp_path: Path) -> None:
    """They are set in `on_step_begin`, after the batches of the step were fetched."""

    def prepare(trainer: Any) -> None:
        def begin(args: Any, state: Any, *_: Any, **__: Any) -> None:
            find_handle(trainer.model).enabled = on[state.global_step]  # type: ignore[union-attr]

        trainer.callback_handler.callbacks[-1].on_step_begin = begin

    steps, handle, said = run(
        InOrder, tmp_path, prepare=prepare, samples=UNEQUAL_IMAGES, logged=on[0]
    )
    for step, wanted in zip(steps, on, strict=True):
        if wanted:
            assert_head(step, of_the_step(handle))
        else:
            assert not any(name.startswith("pre_head") for name in step)
    assert said == []


def one_rank_uncounted(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    def collator(indices: list[int]) -> dict[str, torch.Tensor]:
        return prompts(indices) if 0 in indices else collate("llava", UNEQUAL_IMAGES)(indices)

    class Some(InOrder):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = dict(inputs)
            if "prompt_input_ids" in inputs:
                inputs["input_ids"] = inputs.pop("prompt_input_ids")
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = build("llava")
    handle = apply_pre(model, group="world")
    with warnings.catch_warnings(record=True) as caught, patch_trainer():
        warnings.simplefilter("always")
        options = arguments(folder, 1, 1, max_steps=3, learning_rate=0.0)
        data = {"train_dataset": Samples(UNEQUAL_IMAGES), "data_collator": collator}
        Some(model=model, args=options, **data).train()
    head = {name: p.detach().clone() for name, p in handle.head.named_parameters()}
    return head, pre_warnings(caught)


def test_one_process_that_cannot_count(tmp_path: Path) -> None:
    """Neither process waits for the other to take part in the count of a group."""
    (zero, said), (one, _) = both(one_rank_uncounted, tmp_path)
    assert all(torch.equal(tensor, one[name]) for name, tensor in zero.items())
    only(said, r"the batches of Some cannot be counted")


def prompts(indices: list[int]) -> dict[str, torch.Tensor]:
    """A mapping that is converted to the arguments of the forward later."""
    data = collate("llava", UNEQUAL_IMAGES)(indices)
    return data | {"prompt_input_ids": data.pop("input_ids")}


class Prompts(InOrder):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        return super().compute_loss(
            model, inputs | {"input_ids": inputs.pop("prompt_input_ids")}, *args, **kwargs
        )


def test_a_mapping_without_input_ids(tmp_path: Path) -> None:
    steps, handle, said = run(Prompts, tmp_path, collator=prompts)
    for step in steps:
        assert_head(step, own_means(handle))
    only(
        said,
        r"the batches of Prompts cannot be counted before their forwards "
        r"\(ValueError: input_ids: the forward",
    )


def test_a_mask_fn_of_the_forwards_arguments(tmp_path: Path) -> None:
    """A mask_fn as the error asks for it: it does not know the collator's batch."""
    mask = {"mask_fn": lambda inputs: inputs["input_ids"] == IMAGE}
    steps, handle, said = run(Prompts, tmp_path, collator=prompts, **mask)
    for step in steps:
        assert_head(step, own_means(handle))
    only(
        said,
        r"the batches of Prompts cannot be counted before their forwards \(KeyError: 'input_ids'\)",
    )


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    """Counting, comparing and warning read nothing more on the host than a training without PRe.

    The only exception is the check whether the first images have visual tokens.
    """
    waits: list[list[str]] = []

    class Watched(InOrder):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with Waits() as seen:
                done = super().training_step(*args, **kwargs)
            waits.append(seen.found)
            return done

    run(Watched, tmp_path)
    with_pre = waits.copy()
    waits.clear()
    trainer = Watched(
        model=build("llava"),
        args=arguments(tmp_path, 2, 2, max_steps=3),
        train_dataset=Samples(UNEQUAL_IMAGES),
        data_collator=collate("llava", UNEQUAL_IMAGES),
    )
    trainer.train()
    assert with_pre[0].pop() == "aten._local_scalar_dense.default"
    assert with_pre == waits
