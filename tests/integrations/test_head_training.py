"""How the head is trained: its optimizer groups, under any trainer and optimizer."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from pre_kernels.integrations import apply_pre, patch_trainer

from .support.tiny.models import build
from .support.tiny.training import InOrder, Recorder, make

OPTIONS = {"head_lr": 0.3, "head_weight_decay": 0.02}


class Groups(TrainerCallback):
    """Keeps for each step the (lr, weight decay, parameter names) of each group that has
    parameters."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[float, float, set[str]]]] = []

    def on_step_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        names = {id(p): n for n, p in model.named_parameters()}
        groups = [
            (g["lr"], g["weight_decay"], {names[id(p)] for p in g["params"]})
            for g in optimizer.param_groups
        ]
        self.steps.append([group for group in groups if group[2]])


WEIGHTS, BIASES = {"pre_head.w1", "pre_head.w2"}, {"pre_head.b1", "pre_head.b2"}


class OwnOptimizer(InOrder):
    """Makes a single group of all parameters, like some trainers."""

    def create_optimizer(self, *_: Any) -> Any:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=self.args.learning_rate, weight_decay=0.1)
        return self.optimizer


class LeavesOut(OwnOptimizer):
    """Takes only the names that it expects, like LLaVA's trainers."""

    def create_optimizer(self, *_: Any) -> Any:
        parameters = [
            p for n, p in self.model.named_parameters() if n.startswith(("model.", "lm_head."))
        ]
        self.optimizer = torch.optim.AdamW(parameters, lr=self.args.learning_rate, weight_decay=0.1)
        return self.optimizer


@pytest.mark.parametrize("trainer_class", [InOrder, OwnOptimizer, LeavesOut])
def test_the_head_has_groups_of_its_own(trainer_class: type, tmp_path: Path) -> None:
    model = build("llava")
    groups = Groups()
    apply_pre(model, **OPTIONS)
    more = {"optim": "adamw_torch", "learning_rate": 0.1, "weight_decay": 0.1, "max_steps": 3}
    with patch_trainer():
        trainer = make(
            tmp_path, model, trainer_class, callbacks=[groups], lr_scheduler_type="linear", **more
        )
        trainer.train()
        assert "create_optimizer" not in vars(trainer)
    for step, (*others, weights, biases) in enumerate(groups.steps):
        share = 1 - step / 3
        assert weights == (pytest.approx(0.3 * share), 0.02, WEIGHTS)
        assert biases == (pytest.approx(0.3 * share), 0.0, BIASES)
        assert all(lr == pytest.approx(0.1 * share) for lr, _, _ in others)
        assert not any(name.startswith("pre_head") for _, _, names in others for name in names)
        assert {n for *_, names in groups.steps[step] for n in names} == {
            n for n, _ in model.named_parameters()
        }
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_without_options_only_the_biases_differ(tmp_path: Path) -> None:
    model = build("llava")
    groups = Groups()
    apply_pre(model)
    with patch_trainer():
        make(tmp_path, model, callbacks=[groups], weight_decay=0.1).train()
    assert groups.steps[0][-2:] == [(0.1, 0.1, WEIGHTS), (0.1, 0.0, BIASES)]


def test_training_twice_makes_the_groups_once(tmp_path: Path) -> None:
    model = build("llava")
    groups = Groups()
    apply_pre(model, **OPTIONS)
    with patch_trainer():
        trainer = make(tmp_path, model, callbacks=[groups])
        trainer.train()
        trainer.train()
    assert groups.steps[0] == groups.steps[1]


def test_an_optimizer_that_is_given_stays(tmp_path: Path) -> None:
    model = build("llava")
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = apply_pre(model, **OPTIONS)
    before = handle.head.w1.detach().clone()
    with (
        patch_trainer(),
        pytest.warns(UserWarning, match=r"lacks parameters of the head") as caught,
    ):
        make(tmp_path, model, optimizers=(early, None)).train()
    assert len([w for w in caught if str(w.message).startswith("PRe: ")]) == 1
    assert torch.equal(before, handle.head.w1)

    rest = [p for n, p in model.named_parameters() if not n.startswith("pre_head")]
    late = torch.optim.SGD([{"params": rest}, *handle.param_groups()], lr=0.1)
    with patch_trainer(), warnings.catch_warnings():
        # A warning of the first training does not silence that of the second.
        warnings.filterwarnings("error", message="PRe: ")
        make(tmp_path, model, optimizers=(late, None)).train()
    assert not torch.equal(before, handle.head.w1)
    assert [g["lr"] for g in late.param_groups] == [0.1, 0.3, 0.3]


@pytest.mark.parametrize("option", ["head_lr", "head_weight_decay", None])
def test_an_optimizer_made_before_the_training(option: str | None, tmp_path: Path) -> None:
    """The groups of a given optimizer stay, and a warning is given if they differ from the
    requested settings."""
    model = build("llava")
    apply_pre(model, **({} if option is None else {option: OPTIONS[option]}))
    with patch_trainer():
        trainer = make(tmp_path, model)
        trainer.create_optimizer()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
    told = [str(warning.message) for warning in caught if "head_lr" in str(warning.message)]
    assert len(told) == (option is not None)
    assert not any("made before the training" not in message for message in told)


def test_param_groups_of_several_heads_and_frozen_ones() -> None:
    handle = apply_pre(build("llava"), [1, 2], bias=False, head_lr=0.2)
    (weights,) = handle.param_groups()
    assert (len(weights["params"]), weights["lr"], "weight_decay" in weights) == (4, 0.2, False)
    handle.head[0].requires_grad_(False)
    assert len(handle.param_groups()[0]["params"]) == 2
    handle.remove()
    handle = apply_pre(build("llava"), depth=3, norm="layer", head_weight_decay=0.1)
    weights, others = handle.param_groups()
    head = handle.head
    assert {*map(id, weights["params"])} == {*map(id, (head.w1, head.w2, head.w3))}
    assert (len(others["params"]), others["weight_decay"]) == (5, 0.0)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"head_dtype": "float32"}, TypeError, r"head_dtype: got 'float32', want a torch.dtype"),
        (
            {"head_dtype": torch.bfloat16},
            ValueError,
            r"head_dtype: got torch.bfloat16 over a layer in torch.float32",
        ),
        ({"head_dtype": torch.float64}, ValueError, r"head_dtype: got torch.float64"),
        ({"head_lr": -1}, ValueError, r"head_lr: got -1, want a finite number"),
        ({"head_lr": "1e-3"}, TypeError, r"head_lr: got '1e-3' .str., want a number"),
        ({"head_weight_decay": math.nan}, ValueError, r"head_weight_decay: got nan"),
        ({"schedule": "linear"}, ValueError, r"schedule: got 'linear'"),
        ({"warmup": 1.5}, ValueError, r"warmup: got 1.5, want a share"),
        ({"warmup": True}, TypeError, r"warmup: got True"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build("llava")
    with pytest.raises(error, match=message):
        apply_pre(model, **given)
    assert not hasattr(model, "pre_head")


def test_a_smaller_batch_after_running_out_of_memory(tmp_path: Path) -> None:
    """auto_find_batch_size starts the training again. Nothing of the first attempt may remain."""
    failed: list[int] = []

    class Fails(InOrder):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if len(inputs["input_ids"]) > 3:
                failed.append(1)
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return loss

    model = build("llava")
    recorder = Recorder()
    groups = Groups()
    handle = apply_pre(model, **OPTIONS)
    with patch_trainer():
        trainer = make(
            tmp_path, model, Fails, accumulation=1, size=4, auto_find_batch_size=True, max_steps=2,
            callbacks=[recorder, groups],
        )  # fmt: skip
        trainer.train()
    assert failed
    assert trainer._train_batch_size < 4
    assert len(recorder.steps) == 2
    log = next(entry for entry in trainer.state.log_history if "pre_tokens" in entry)
    assert log["pre_tokens"] == 4 * trainer._train_batch_size
    assert handle._capture.seen is None
    assert handle._deferred is None
    assert groups.steps[0][-2:] == [(0.3, 0.02, WEIGHTS), (0.3, 0.0, BIASES)]
    assert "backward" not in vars(trainer.accelerator)


def test_patch_leaves_no_trace(tmp_path: Path) -> None:
    before = dict(vars(Trainer))
    model = build("llava")
    apply_pre(model, **OPTIONS)
    with patch_trainer():
        trainer = make(tmp_path, model)
        trainer.train()
    assert dict(vars(Trainer)) == before
    assert not {"create_optimizer", "log"} & vars(trainer).keys()
