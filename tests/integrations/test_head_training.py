"""How the head is trained: optimizer groups, master weights, λ's schedule, what is logged,
freezing; in any loop."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from pre_kernels import PreHead, reference
from pre_kernels.integrations import apply_pre, patch_trainer
from pre_kernels.integrations.metrics import SAMPLE, sample_cosine

from .support.by_hand import copy_of, pre_loss, watch
from .support.tiny.models import batch, build
from .support.tiny.training import (
    EQUAL,
    UNEQUAL_IMAGES,
    InOrder,
    Recorder,
    Samples,
    arguments,
    collate,
)

OPTIONS = {"head_lr": 0.3, "head_weight_decay": 0.02}


def make(
    folder: Path, model: Any, trainer_class: type = InOrder, samples: Any = EQUAL, **more: Any
) -> Any:
    callbacks = more.pop("callbacks", None)
    accumulation = more.pop("accumulation", 2)
    size = more.pop("size", len(samples) // accumulation)
    extra = {
        name: more.pop(name)
        for name in ("optimizers", "eval_dataset", "compute_loss_func", "model_init")
        if name in more
    }
    return trainer_class(
        model=model,
        args=arguments(folder, accumulation, size, **more),
        train_dataset=Samples(samples),
        data_collator=collate("llava", samples),
        callbacks=callbacks,
        **extra,
    )


class Groups(TrainerCallback):
    """Keeps each step's (lr, weight decay, parameter names) per group that has any."""

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
    """Makes one group of everything, as some trainers do."""

    def create_optimizer(self, *_: Any) -> Any:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=self.args.learning_rate, weight_decay=0.1)
        return self.optimizer


class LeavesOut(OwnOptimizer):
    """Knows only the names that it expects, as LLaVA's trainers do."""

    def create_optimizer(self, *_: Any) -> Any:
        parameters = [
            p for n, p in self.model.named_parameters() if n.startswith(("model.", "lm_head."))
        ]
        self.optimizer = torch.optim.AdamW(parameters, lr=self.args.learning_rate, weight_decay=0.1)
        return self.optimizer


@pytest.mark.parametrize("trainer_class", [InOrder, OwnOptimizer, LeavesOut])
def test_the_head_has_groups_of_its_own(trainer_class: type, tmp_path: Path) -> None:
    model, groups = build("llava"), Groups()
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
    model, groups = build("llava"), Groups()
    apply_pre(model)
    with patch_trainer():
        make(tmp_path, model, callbacks=[groups], weight_decay=0.1).train()
    assert groups.steps[0][-2:] == [(0.1, 0.1, WEIGHTS), (0.1, 0.0, BIASES)]


def test_training_twice_makes_the_groups_once(tmp_path: Path) -> None:
    model, groups = build("llava"), Groups()
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
        warnings.filterwarnings(
            "error", message="PRe: "
        )  # the first training is no matter of the second
        make(tmp_path, model, optimizers=(late, None)).train()
    assert not torch.equal(before, handle.head.w1)
    assert [g["lr"] for g in late.param_groups] == [0.1, 0.3, 0.3]


@pytest.mark.parametrize("option", ["head_lr", "head_weight_decay", None])
def test_an_optimizer_made_before_the_training(option: str | None, tmp_path: Path) -> None:
    """Its groups stay as they are, and a warning says so where they are not what was asked for."""
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


# --- master weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_head_over_a_half_precision_model(dtype: torch.dtype) -> None:
    data = batch("llava")
    data.inputs["pixel_values"] = data.inputs["pixel_values"].to(dtype)
    found = {}
    for head_dtype in (None, torch.float32):
        model = build("llava").to(dtype)
        torch.manual_seed(5)
        handle = apply_pre(model, head_dtype=head_dtype)
        with torch.no_grad():  # alike in both dtypes
            for parameter in handle.head.parameters():
                parameter.copy_(
                    torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter).sin().to(dtype)
                )
        dtypes = []
        handle.head.register_forward_pre_hook(
            lambda *_, d=dtypes: d.append(torch.is_autocast_enabled("cpu"))
        )
        model(**data.inputs).loss.backward()
        assert dtypes == [head_dtype is not None]
        assert {p.dtype for p in handle.head.parameters()} == {head_dtype or dtype}
        found[head_dtype] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, gradient in found[None].items():
        other = found[torch.float32][name]
        assert other.dtype == (torch.float32 if name.startswith("pre_head") else dtype)
        torch.testing.assert_close(
            other.to(dtype), gradient, rtol=4 * torch.finfo(dtype).eps, atol=1e-5
        )


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
        ({"head_lr": "1e-3"}, TypeError, r"head_lr: got str, want a number"),
        ({"head_weight_decay": math.nan}, ValueError, r"head_weight_decay: got nan"),
        ({"schedule": "linear"}, ValueError, r"schedule: got 'linear'"),
        ({"warmup": 1.5}, ValueError, r"warmup: got 1.5, want a share"),
        ({"warmup": True}, TypeError, r"warmup: got bool"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build("llava")
    with pytest.raises(error, match=message):
        apply_pre(model, **given)
    assert not hasattr(model, "pre_head")


# --- λ along the training


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {0.0: 1, 0.5: 1, 1.0: 1}),
        ({"warmup": 0.2}, {0.0: 0, 0.1: 0.5, 0.2: 1, 1.0: 1}),
        ({"schedule": "cosine"}, {0.0: 1, 0.25: 0.5 + 0.25 * math.sqrt(2), 0.5: 0.5, 1.0: 0}),
        ({"schedule": "cosine", "warmup": 0.5}, {0.25: 0.5, 0.5: 1, 0.75: 0.5, 1.0: 0}),
        ({"schedule": "cosine", "warmup": 1}, {0.25: 0.25, 1.0: 1}),
    ],
)
def test_schedule(options: dict[str, Any], wanted: dict[float, float]) -> None:
    model, data = build("llava"), batch("llava")
    base = float(model(**data.inputs).loss.detach())
    handle = apply_pre(model, weight=0.8, **options)
    calls: list[int] = []
    handle.head.register_forward_hook(lambda *_: calls.append(1))
    for progress, factor in wanted.items():
        handle.progress = progress
        assert handle.scheduled_weight == pytest.approx(0.8 * factor, abs=1e-12)
        calls.clear()
        loss = float(model(**data.inputs).loss.detach())
        found = handle.metrics()
        assert ("pre_weight" in found) == bool(options)
        assert len(calls) == (factor > 1e-12)
        added = 0.8 * factor * found["pre_loss"] if calls else 0
        assert loss - base == pytest.approx(added, abs=2e-6)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_wrong_progress(value: float) -> None:
    handle = apply_pre(build("llava"))
    with pytest.raises(ValueError, match=r"progress: got"):
        handle.progress = value


def test_the_trainer_moves_along_the_schedule(tmp_path: Path) -> None:
    """Every step has a λ above 0 (DDP wants the head in each graph) and a resumed training the same
    ones."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    logs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = build("llava")
        handle = apply_pre(model, schedule="cosine", warmup=0.4)
        with patch_trainer():
            trainer = make(tmp_path, model, **saving)
            trainer.train(resume_from_checkpoint=resume)
        logs.append([e["pre_weight"] for e in trainer.state.log_history if "pre_weight" in e])
    wanted = [
        0.125,
        0.375,
        *(0.25 * (1 + math.cos(math.pi * (s - 0.4) / 0.6)) for s in (0.5, 0.7, 0.9)),
    ]
    assert logs[0] == logs[1] == pytest.approx(wanted)
    assert handle.progress == pytest.approx(0.9)


# --- logs


LOGGED = ("pre_loss", "pre_cosine", "pre_tokens", "pre_head_grad_norm")


class Seen(TrainerCallback):
    """What on_log callbacks, such as wandb's and TensorBoard's, are given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("loss", ["cosine", "mse"])
@pytest.mark.parametrize("level", ["patch", "image"])
def test_logs(loss: str, level: str, tmp_path: Path) -> None:
    model, seen, recorder = build("llava"), Seen(), Recorder()
    handle = apply_pre(model, loss=loss, level=level)
    head = copy_of(handle.head)
    with patch_trainer():
        trainer = make(
            tmp_path, model, samples=UNEQUAL_IMAGES, callbacks=[seen, recorder], max_steps=2, logging_steps=2,
            learning_rate=0.0, max_grad_norm=0.05,
        )  # fmt: skip
        trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {name: log[name] for name in LOGGED} == {name: seen.logs[0][name] for name in LOGGED}
    assert log["pre_tokens"] == 2 * 16
    assert not any(name in log for name in ("pre_rows", "pre_forwards", "pre_weight"))

    plain = build("llava")
    watched = watch(plain, "llava")
    sums = {"cosine": 0.0, loss: 0.0}
    count = 0
    for index, sample in enumerate(UNEQUAL_IMAGES):
        data = batch("llava", [sample], seed=index)
        plain(**data.inputs)
        for kind in sums:
            sums[kind] += float(
                pre_loss(watched, data, [2], head, level, loss=kind, reduction="sum").detach()
            )
        count += int(data.visual.sum()) if level == "patch" else len(data.lengths)
    assert log["pre_loss"] == pytest.approx(sums[loss] / count, rel=1e-5)
    assert log["pre_cosine"] == pytest.approx(-sums["cosine"] / count, rel=1e-5)
    gradients = [g for n, g in recorder.steps[-1].items() if n.startswith("pre_head")]
    assert log["pre_head_grad_norm"] == pytest.approx(
        float(torch.cat([g.flatten() for g in gradients]).norm())
    )
    assert log["pre_head_grad_norm"] < 0.05  # as the optimizer takes it


@pytest.mark.parametrize("kind", ["mask", "compact", "all", "none"])
def test_sampled_cosines(kind: str) -> None:
    """At most SAMPLE rows, spread over all; all of them where there are fewer."""
    generator = torch.Generator().manual_seed(0)
    head = PreHead(8, out_dim=5)
    for rows in (40, 2000):
        hidden = torch.randn(2, rows, 8, generator=generator)
        anchor = torch.randn(2, rows, 5, generator=generator)
        mask = torch.rand(2, rows, generator=generator) < (0 if kind == "none" else 0.4)
        given, chosen = (anchor, mask) if kind in ("mask", "none") else (anchor[mask], mask)
        if kind == "all":
            hidden, given, chosen, mask = (
                hidden[0],
                anchor[0],
                None,
                torch.ones(rows, dtype=torch.bool),
            )
            anchor = given
        total, number = sample_cosine(head, hidden, given, chosen, "torch").tolist()
        every = -reference.pre_loss(
            hidden, anchor, head.w1, head.b1, head.w2, head.b2, mask, reduction="none"
        ).detach()
        assert number == min(len(every), SAMPLE)
        if len(every) <= SAMPLE:
            assert total == pytest.approx(float(every.sum()), abs=1e-4)
        else:
            places = (torch.arange(SAMPLE) * (len(every) / SAMPLE)).long()
            assert total == pytest.approx(float(every[places].sum()), abs=1e-3)


# --- the Trainer's own options


def test_the_last_accumulation_is_incomplete(tmp_path: Path) -> None:
    """Five samples, two at a time, two batches a step: the second step has one sample alone."""
    model, recorder = build("llava"), Recorder()
    handle = apply_pre(model)
    head = copy_of(handle.head)
    samples = [*UNEQUAL_IMAGES, [("text", 2), ("image", 8, 8), ("text", 4)]]
    with patch_trainer():
        make(
            tmp_path, model, samples=samples, size=2, callbacks=[recorder], max_steps=-1, num_train_epochs=1,
            learning_rate=0.0, include_num_input_tokens_seen=True, torch_empty_cache_steps=1,
        ).train()  # fmt: skip
    assert len(recorder.steps) == 2
    plain = build("llava")
    seen = watch(plain, "llava")
    for step, part in zip(recorder.steps, ([0, 1, 2, 3], [4]), strict=True):
        data = [batch("llava", [samples[i]], seed=i) for i in part]
        tokens = sum(int(d.visual.sum()) for d in data)
        for parameter in head.values():
            parameter.grad = None
        for each in data:
            plain(**each.inputs)
            (0.5 / tokens * pre_loss(seen, each, [2], head, reduction="sum")).backward()
        for name, parameter in head.items():
            torch.testing.assert_close(
                step[f"pre_head.{name}"], parameter.grad, rtol=2e-4, atol=1e-7
            )


def test_evaluation_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    heads, logs = [], []
    for more in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Samples(EQUAL)}):
        model = build("llava")
        handle = apply_pre(model)
        with patch_trainer():
            trainer = make(tmp_path, model, max_steps=3, **more)
            trainer.train()
        heads.append(handle.head.w1.detach().clone())
        logs.append([e["pre_loss"] for e in trainer.state.log_history if "pre_loss" in e])
    assert torch.equal(*heads)
    assert logs[0] == logs[1]


def test_a_smaller_batch_after_running_out_of_memory(tmp_path: Path) -> None:
    """auto_find_batch_size starts the training anew: nothing of the first attempt is left."""
    failed: list[int] = []

    class Fails(InOrder):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(model, inputs, *args, **kwargs)
            if len(inputs["input_ids"]) > 3:
                failed.append(1)
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return found

    model, recorder, groups = build("llava"), Recorder(), Groups()
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


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    flat = outputs.logits[:, :-1].flatten(0, 1).float()
    return (
        torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum")
        / num_items_in_batch
    )


def test_compute_loss_func(tmp_path: Path) -> None:
    """It is given the labels instead of the model."""
    found = []
    for func in (None, own_loss):
        model, recorder = build("llava"), Recorder()
        apply_pre(model)
        with patch_trainer():
            make(
                tmp_path,
                model,
                samples=UNEQUAL_IMAGES,
                callbacks=[recorder],
                compute_loss_func=func,
            ).train()
        found.append(recorder.steps[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=2e-6)


def test_freezing_and_unfreezing_in_the_middle(tmp_path: Path) -> None:
    class Toggles(TrainerCallback):
        def __init__(self) -> None:
            self.moved: list[tuple[bool, bool]] = []

        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            head, rest = [(True, True), (False, True), (True, False), (True, True)][
                state.global_step
            ]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(head if name.startswith("pre_head") else rest)
            self.before = (
                model.pre_head.w1.detach().clone(),
                model.lm_head.weight.detach().clone(),
            )

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            now = (model.pre_head.w1, model.lm_head.weight)
            self.moved.append(
                tuple(not torch.equal(a, b) for a, b in zip(self.before, now, strict=True))
            )

    model, toggles = build("llava"), Toggles()
    apply_pre(model)
    with patch_trainer():
        make(tmp_path, model, max_steps=4, callbacks=[toggles]).train()
    assert toggles.moved == [(True, True), (False, True), (True, False), (True, True)]


def test_patch_leaves_no_trace(tmp_path: Path) -> None:
    before = dict(vars(Trainer))
    model = build("llava")
    apply_pre(model, **OPTIONS)
    with patch_trainer():
        trainer = make(tmp_path, model)
        trainer.train()
    assert dict(vars(Trainer)) == before
    assert not {"create_optimizer", "log"} & vars(trainer).keys()
