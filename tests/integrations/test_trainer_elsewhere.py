"""transformers.Trainer: a checkpoint of two processes is resumed on another number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from pre_kernels.integrations import apply_pre
from pre_kernels.integrations.optimizers import unwrapped

from .support.by_hand import assert_same_gradients, copy_of, gradients, pre_loss, watch
from .support.processes import both, every
from .support.ranks import PLAIN, TWO_IMAGES, need_deepspeed
from .support.split_trainings import RUNS, trained
from .support.tiny.models import batch, build
from .support.tiny.training import labels_of, one_image

# A step takes all of them, on any number of processes.
SAMPLES = [TWO_IMAGES, PLAIN, one_image(6), TWO_IMAGES, PLAIN, one_image(4), PLAIN, TWO_IMAGES]
State = dict[str, Tensor]


class Keeps(TrainerCallback):
    """Keeps the whole model and its moments in Adam, as they were saved and as the training began,
    and the gradients of the last step."""

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
    ) -> None:
        self.saved = whole(model, optimizer)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
    ) -> None:
        self.begun = whole(model, optimizer)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        self.gradients = {
            name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None
        }


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def whole(model: Any, optimizer: Any) -> State:
    found = {}
    state = unwrapped(optimizer).state
    for name, parameter in model.named_parameters():
        found[name] = full(parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state.get(parameter, {}):
                found[f"{name}/{moment}"] = full(state[parameter][moment])
    return found


def run(how: str, folder: str, steps: int, resume: str | None, count: int) -> Keeps:
    keeps = Keeps()
    options = {
        "samples": SAMPLES,
        "callbacks": [keeps],
        "gradient_accumulation_steps": len(SAMPLES) // count,
    }
    if how == "DDP":
        options |= {"max_grad_norm": 0.0, "optim": "adamw_torch", "learning_rate": 0.01}
    if count == 1:
        trained(folder, steps, resume, **options)
    else:
        function, *settings = RUNS[how]
        function(*settings, folder, steps, resume, **options)
    return keeps


def by_hand(state: State) -> dict[str, Tensor]:
    """The gradients of a step on one process, from the model and head in `state`."""
    model = build("llava")
    model.model.vision_tower.requires_grad_(False)
    handle = apply_pre(model)
    model.load_state_dict({n: t for n, t in state.items() if "/" not in n}, strict=False)
    head = copy_of(handle.head)
    handle.remove()
    seen = watch(model, "llava")
    samples = [batch("llava", [sample], seed=place) for place, sample in enumerate(SAMPLES)]
    labels = [labels_of("llava", sample, place) for place, sample in enumerate(SAMPLES)]
    tokens = sum(int(data.visual.sum()) for data in samples)
    for data, count in zip(samples, labels, strict=True):
        loss = model(**data.inputs).loss * count / sum(labels)
        loss = loss + 0.5 * pre_loss(seen, data, [2], head, reduction="sum") / tokens
        loss.backward()
    found = gradients(model) | {f"pre_head.{n}": p.grad for n, p in head.items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("DDP", 1),
        pytest.param("DDP", 4, marks=pytest.mark.slow),
        pytest.param("FSDP2, sharded", 4, marks=pytest.mark.slow),
    ],
)
def test_resuming_on_another_number_of_processes(how: str, count: int, tmp_path: Path) -> None:
    """Model, head and optimizer are those that were saved, and the visual tokens of the next step
    are counted over the new processes."""
    saved = both(run, how, str(tmp_path / "a"), 1, None, 2)[0].saved
    assert len([name for name in saved if name.startswith("pre_head.")]) == 4 * 3
    arguments = how, str(tmp_path / "b"), 2, str(tmp_path / "a" / "checkpoint-1"), count
    ranks = [run(*arguments)] if count == 1 else every(count, run, *arguments, timeout=300)
    for keeps in ranks:
        assert keeps.begun.keys() == saved.keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in keeps.begun.items())
        assert_same_gradients(keeps.gradients, by_hand(saved))


def resumes_without_fsdp(folder: str, resume: str) -> None:
    with pytest.raises(ValueError, match=r"is only supported when using PyTorch FSDP"):
        trained(folder, 2, resume, ddp_backend="gloo")


@pytest.mark.slow
def test_a_checkpoint_of_fsdp_is_refused_without_it(tmp_path: Path) -> None:
    """By the Trainer."""
    both(RUNS["FSDP2, sharded"][0], *RUNS["FSDP2, sharded"][1:], str(tmp_path / "a"), 1, None)
    both(resumes_without_fsdp, str(tmp_path / "b"), str(tmp_path / "a" / "checkpoint-1"))


# ZeRO-3 does not check the number. Its parts have other sizes, and the additional ranks have none,
# which DeepSpeed asserts without a text.
REFUSALS = {
    "ZeRO-2": r"Automatic adjustment .* is not currently supported",
    "ZeRO-3": r"^$|The size of tensor a .* must match the size of tensor b",
}


def resumes_on_more(how: str, folder: str, resume: str) -> None:
    function, *settings = RUNS[how]
    with pytest.raises(Exception, match=REFUSALS[how]) as caught:
        function(*settings, folder, 2, resume)
    assert "deepspeed" in caught.traceback[-1].path.parts


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ZeRO-2", "ZeRO-3"])
def test_zero_is_refused_on_another_number_of_processes(how: str, tmp_path: Path) -> None:
    """By DeepSpeed, before the first step. The head's files can be loaded all the same."""
    need_deepspeed()
    function, *settings = RUNS[how]
    both(function, *settings, str(tmp_path / "a"), 1, None)
    every(
        4,
        resumes_on_more,
        how,
        str(tmp_path / "b"),
        str(tmp_path / "a" / "checkpoint-1"),
        timeout=300,
    )
    apply_pre(build("llava")).load(tmp_path / "a" / "checkpoint-1")
