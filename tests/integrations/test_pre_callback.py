"""PreCallback attaches PRe with only a callback, without patching a class; and Lightning's
callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from pre_kernels.integrations import apply_pre, find_handle
from pre_kernels.integrations.pre_callback import PreCallback

from .support.processes import both
from .support.tiny.models import batch, build
from .support.tiny.training import EQUAL, Recorder, Samples, assert_head, by_hand, make

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("later", [False, True], ids=["callbacks=", "add_callback"])
def test_a_training(later: bool, tmp_path: Path) -> None:
    """Gradients are those by hand, the log has the metrics, the checkpoint has the head, and the
    class is unchanged."""
    before = dict(vars(Trainer))
    model = build("llava")
    callback = PreCallback(layer=2, weight=0.5)
    recorder = Recorder()
    trainer = make(
        tmp_path,
        model,
        max_steps=4,
        callbacks=[recorder] if later else [recorder, callback],
        **SAVING,
    )
    if later:
        trainer.add_callback(callback)
    assert (find_handle(model) is None) is later
    trainer.train()
    assert dict(vars(Trainer)) == before
    assert callback.handle is find_handle(model)
    log = trainer.state.log_history[0]
    assert -1 <= log["pre_loss"] <= 1
    assert log["pre_tokens"] == 16
    assert log["pre_head_grad_norm"] > 0
    assert trainer.state.log_history[3]["pre_loss"] < log["pre_loss"]
    again = build("llava")
    with apply_pre(again) as handle:
        handle.load(tmp_path / "checkpoint-4")
        assert torch.equal(handle.head.w1, callback.handle.head.w1)
    callback.handle.remove()
    assert model.state_dict().keys() == build("llava").state_dict().keys()


def test_the_gradient_is_by_hand(tmp_path: Path) -> None:
    recorder = Recorder()
    callback = PreCallback()
    trainer = make(tmp_path, build("llava"), learning_rate=0.0, callbacks=[recorder, callback])
    with apply_pre(build("llava")) as fresh:
        callback.handle.head.load_state_dict(fresh.head.state_dict())
    trainer.train()
    assert_head(recorder.steps[0], by_hand("llava", EQUAL, callback.handle, [0.25] * 4, "mean"))


def test_the_schedule_moves(tmp_path: Path) -> None:
    callback = PreCallback(schedule="cosine", warmup=0.5)
    trainer = make(tmp_path, build("llava"), max_steps=4, callbacks=[callback])
    trainer.train()
    weights = [entry["pre_weight"] for entry in trainer.state.log_history if "pre_weight" in entry]
    assert weights == pytest.approx([0.125, 0.375, 0.5 * 0.8535534, 0.5 * 0.1464466])


class Starts(TrainerCallback):
    """Keeps a copy of the head from the beginning of the training."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.w1 = model.pre_head.w1.detach().clone()


def test_resuming(tmp_path: Path) -> None:
    callback = PreCallback()
    make(tmp_path, build("llava"), max_steps=2, callbacks=[callback], **SAVING).train()
    torch.manual_seed(9)
    starts = Starts()
    trainer = make(
        tmp_path, build("llava"), max_steps=4, callbacks=[PreCallback(), starts], **SAVING
    )
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(starts.w1, callback.handle.head.w1)
    (tmp_path / "checkpoint-4" / "pre_head.json").unlink()
    trainer = make(tmp_path, build("llava"), max_steps=5, callbacks=[PreCallback()], **SAVING)
    with pytest.raises(ValueError, match=r"of a save that was interrupted"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / "pre_head.safetensors").unlink()
    trainer = make(tmp_path, build("llava"), max_steps=5, callbacks=[PreCallback()], **SAVING)
    with pytest.warns(UserWarning, match=r"PRe: .*checkpoint-4 holds no head"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_from_elsewhere(tmp_path: Path) -> None:
    """`train()` tells no callback its folder. A folder of the same step in `output_dir` may belong
    to another training."""
    callback, other = PreCallback(), PreCallback()
    make(tmp_path / "a", build("llava"), max_steps=2, callbacks=[callback], **SAVING).train()
    make(
        tmp_path / "b", build("llava"), max_steps=2, learning_rate=0.3, callbacks=[other], **SAVING
    ).train()
    starts = Starts()
    trainer = make(
        tmp_path / "b", build("llava"), max_steps=4, callbacks=[PreCallback(), starts], **SAVING
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(starts.w1, callback.handle.head.w1)
    assert not torch.equal(starts.w1, other.handle.head.w1)


def test_the_best_model_has_its_head(tmp_path: Path) -> None:
    callback = PreCallback()
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 5.0,
    }
    options = SAVING | best | {"save_steps": 1, "max_steps": 3, "eval_dataset": Samples(EQUAL)}
    trainer = make(tmp_path, build("llava"), callbacks=[callback], **options)
    trainer.train()
    folder = trainer.state.best_model_checkpoint
    assert not folder.endswith("-3")
    with apply_pre(build("llava")) as handle:
        handle.load(folder)
        assert torch.equal(handle.head.w1, callback.handle.head.w1)


def added_later(folder: str) -> str:
    """On one of two processes: the error if the model is already wrapped."""
    trainer = make(Path(folder), build("llava"), ddp_backend="gloo", accumulation=1, size=2)
    trainer.add_callback(PreCallback())
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    return ""


def test_two_processes(tmp_path: Path) -> None:
    for text in both(added_later, str(tmp_path)):
        assert "pass callbacks=[PreCallback(...)] when the Trainer is made" in text


def test_wrong_settings() -> None:
    with pytest.raises(
        ValueError, match=r"head_lr: got 0.1, but a callback makes no optimizer groups"
    ):
        PreCallback(head_lr=0.1)


lightning = pytest.importorskip("lightning")
from pre_kernels.integrations.lightning import PreLightningCallback  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self, attached: bool = True) -> None:
        super().__init__()
        self.model = build("llava")
        if attached:
            apply_pre(self.model, schedule="cosine")

    def training_step(self, data: Any, index: int) -> torch.Tensor:
        loss = self.model(**data).loss
        self.last = float(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, module: Any, steps: int, resume: Any = None) -> Any:
    data = [batch("llava", seed=seed).inputs for seed in range(2)] * 2
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=[PreLightningCallback()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=resume)
    return trainer


def test_lightning(tmp_path: Path) -> None:
    module = Module()
    trainer = fit(tmp_path, module, 2)
    first = float(trainer.callback_metrics["pre_loss"])
    assert float(trainer.callback_metrics["pre_weight"]) == pytest.approx(0.5 * 0.1464466)
    task_loss = module.last - 0.5 * 0.1464466 * first
    assert float(trainer.callback_metrics["task_loss"]) == pytest.approx(task_loss, abs=1e-5)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    saved = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {f"model.{key}" for key in build("llava").state_dict()}
    assert set(saved["pre_head"]) == {f"model.pre_head.{name}" for name in ("w1", "b1", "w2", "b2")}

    torch.manual_seed(5)
    again = Module()
    assert not torch.equal(again.model.pre_head.w1, module.model.pre_head.w1)
    trainer = fit(tmp_path, again, 4, tmp_path / "kept.ckpt")
    assert float(trainer.callback_metrics["pre_loss"]) < first
    straight = Module()
    for name, parameter in straight.model.pre_head.named_parameters():
        parameter.data.copy_(saved["pre_head"][f"model.pre_head.{name}"])
    # The training continued from the checkpoint.
    assert not torch.equal(again.model.pre_head.w1, straight.model.pre_head.w1)
    Module(attached=False).load_state_dict(saved["state_dict"])
    with pytest.raises(RuntimeError, match=r"PreLightningCallback: Module has no PRe"):
        fit(tmp_path, Module(attached=False), 1)


class Logged(lightning.pytorch.loggers.logger.DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.steps.setdefault(step, {}).update(metrics)


def logged(
    folder: Path, data: list[Any], module: Any = None, resume: Any = None, **options: Any
) -> tuple[dict[int, dict[str, float]], Any]:
    logger = Logged()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[PreLightningCallback()],
        **options,
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    trainer.fit(module or Module(), loader, ckpt_path=resume)
    return {step: entry for step, entry in logger.steps.items() if "task_loss" in entry}, trainer


def test_lightning_logs_by_optimizer_steps_over_epochs(tmp_path: Path) -> None:
    """With fewer batches in an epoch than steps between logs, with accumulation, and resumed."""
    data = [batch("llava", seed=seed).inputs for seed in range(2)]
    found, trainer = logged(tmp_path, data, max_epochs=4, log_every_n_steps=3)
    assert list(found) == [3, 6]
    assert [entry["pre_tokens"] for entry in found.values()] == [36, 36]  # 12 a batch
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    found, _ = logged(
        tmp_path, data, resume=tmp_path / "kept.ckpt", max_epochs=6, log_every_n_steps=3
    )
    assert list(found) == [9, 12]
    found, _ = logged(tmp_path, data, max_epochs=4, log_every_n_steps=3, accumulate_grad_batches=2)
    assert list(found) == [3]
    assert found[3]["pre_tokens"] == 72
    assert not logged(tmp_path, data, max_epochs=2, log_every_n_steps=0)[0]


def test_lightning_logs_only_the_task_loss_without_visual_tokens(tmp_path: Path) -> None:
    data = [batch("llava", seed=0).inputs, batch("llava", [[("text", 7)]], seed=1).inputs]
    found, _ = logged(tmp_path, data, max_epochs=1, log_every_n_steps=1)
    assert "pre_loss" in found[1]
    assert set(found[2]) & {"pre_loss", "pre_cosine", "pre_tokens", "task_loss"} == {"task_loss"}
    off = Module()
    find_handle(off).weight = 0.0
    found, _ = logged(tmp_path, data, off, max_epochs=1, log_every_n_steps=1)
    assert found[2]["task_loss"] == pytest.approx(off.last)
    assert "pre_loss" not in found[1]


def test_lightning_with_a_model_in_eval_mode(tmp_path: Path) -> None:
    """`from_pretrained` returns a model in this mode, and Lightning leaves it so."""
    module = Module()
    module.model.eval()
    with pytest.raises(RuntimeError, match=r"LlavaForConditionalGeneration is in eval mode"):
        fit(tmp_path, module, 1)
    find_handle(module).enabled = False
    fit(tmp_path, module, 1)


def test_lightning_goes_on_with_the_head_that_was_saved(tmp_path: Path) -> None:
    trainer = fit(tmp_path, module := Module(), 2)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    torch.manual_seed(5)
    fit(tmp_path, again := Module(), 2, tmp_path / "kept.ckpt")  # no step is left
    assert torch.equal(again.model.pre_head.w1, module.model.pre_head.w1)
