"""Heads and checkpoints that earlier versions wrote load into today's code, with their values.

`tests/data/README.md` says what each folder is, and how it was written. None is ever rewritten.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from pre_kernels.integrations import EncoderAnchor, apply_pre, patch_trainer
from pre_kernels.integrations.checkpoint import CONFIG, WEIGHTS
from pre_kernels.integrations.pre_callback import PreCallback
from verify import ROOT

from .support.tiny.models import build
from .support.tiny.training import EQUAL, InOrder, Samples, arguments, collate

DATA = ROOT / "tests" / "data"

# The settings of each head in heads-*.
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"hidden_dim": 2, "loss": "mse", "activation": "silu"},
    "layers": {"layer": [1, 3], "hidden_dim": 2},
    "targets": {"targets": [(2, "pre_llm"), (2, "pre_projector")], "hidden_dim": 2},
    "image": {"level": "image", "hidden_dim": 2, "bias": False, "activation": "relu"},
    "projector": {"layer": 3, "anchor": "pre_projector", "hidden_dim": 2, "loss": "mse"},
    "deep": {"depth": 3, "norm": "layer", "hidden_dim": 2},
    "shallow": {
        "depth": 1,
        "norm": "rms",
        "bias": False,
        "anchor_norm": "spatial",
        "weighting": "image",
    },
    "gram": {"loss": "gram", "hidden_dim": 2, "gram_over": "batch", "anchor_norm": "center"},
    "average": {"hidden_dim": 2},
}
KEPT = sorted(path for folder in DATA.glob("heads-*") for path in folder.iterdir())


def attached(name: str) -> tuple[Any, list[nn.Parameter]]:
    """A handle with the settings of a kept head, and the parameters that are in its file."""
    model: Any = build("llava", seed=1)
    if name != "average":
        handle = apply_pre(model, **HEADS[name])
        return handle, list(handle.head.parameters())
    sizes = {"hidden_size": 4, "intermediate_size": 4, "image_size": 8, "patch_size": 4}
    model.tower = hf.CLIPVisionModel(
        hf.CLIPVisionConfig(num_hidden_layers=1, num_attention_heads=1, **sizes)
    )
    anchor = EncoderAnchor(model.tower, model, image_mean=None, image_std=None, ema=0.9)
    handle = apply_pre(model, anchor=anchor, **HEADS[name])
    return handle, [*handle.head.parameters(), *anchor.encoder.parameters()]


@pytest.mark.parametrize("folder", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_kept_head_loads(folder: Path) -> None:
    """Each parameter was written as numbers from -1 to 1 in equal steps."""
    if folder.name == "average" and hf.__version__.startswith("4"):
        pytest.skip("transformers 4 names the tower's parameters otherwise")
    handle, parameters = attached(folder.name)
    handle.load(folder)
    assert len(parameters) == len(load_file(folder / WEIGHTS))
    for parameter in parameters:
        wanted = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
        assert torch.equal(parameter, wanted)


def test_every_kind_of_head_is_kept() -> None:
    assert {path.name for path in KEPT} == HEADS.keys()
    assert {path.parent.name for path in KEPT} >= {"heads-0.1.0", "heads-0.2.0"}


def test_a_head_of_a_newer_format_says_to_upgrade(tmp_path: Path) -> None:
    handle, _ = attached("plain")
    folder = shutil.copytree(DATA / "heads-0.2.0" / "plain", tmp_path / "head")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"format": 2, "pre_kernels": "9.1"}))
    says = r"pre_head.json': format 2, want 1; a newer version of pre-kernels \(9.1\) wrote it, upg"
    with pytest.raises(ValueError, match=says):
        handle.load(folder)
    for other in (json.dumps([]), json.dumps({"layers": [2]})):
        (folder / CONFIG).write_text(other)
        with pytest.raises(ValueError, match=r"want 1; handle\.save\(\) did not write it"):
            handle.load(folder)


# The parameters that the Trainers of trainer-* trained, in the order of their optimizer's state.
LINEAR = "model.multi_modal_projector.linear_1"
HEAD = ("pre_head.w1", "pre_head.b1", "pre_head.w2", "pre_head.b2")
ORDER = {
    # This version had no groups of the head: groups of what is decayed, and of what is not.
    "trainer-0.1.0": (f"{LINEAR}.weight", *HEAD, f"{LINEAR}.bias"),
    "trainer-0.2.0": (f"{LINEAR}.weight", f"{LINEAR}.bias", *HEAD[::2], *HEAD[1::2]),
}
# The weight decay of each parameter today, where the head's biases are not decayed.
DECAY = dict.fromkeys((f"{LINEAR}.weight", *HEAD[::2]), 0.1)


class Start(TrainerCallback):
    """Keeps the optimizer's state by the names of the parameters, and the head, as they are when
    the training begins."""

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self.step = state.global_step
        self.head = {name: p.detach().clone() for name, p in model.pre_head.named_parameters()}
        self.moments = {}
        self.settings = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                entry = optimizer.state[p]
                self.moments[names[id(p)]] = {k: v.clone() for k, v in entry.items()}
                self.settings[names[id(p)]] = (group["weight_decay"], group["lr"])


def trainer_of(model: Any, folder: Path, callbacks: list[Any], **more: Any) -> Any:
    options = {
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
    }
    return InOrder(
        model=model,
        args=arguments(folder, 1, 2, **options, **more),
        train_dataset=Samples(EQUAL),
        data_collator=collate("llava", EQUAL),
        callbacks=callbacks,
    )


def resumed(kept: Path, folder: Path, **settings: Any) -> Start:
    """Resume a training of two more steps from a copy of a kept checkpoint. The model's own weights
    are not kept, since no version of pre-kernels changes how they are written."""
    model: Any = build("llava")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(LINEAR))
    checkpoint = shutil.copytree(kept, folder / "checkpoint-2")
    model.save_pretrained(checkpoint)
    torch.manual_seed(5)
    apply_pre(model, **({"hidden_dim": 2} | settings))
    start = Start()
    with patch_trainer():
        trainer = trainer_of(model, folder, [start], max_steps=4)
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    return start


@pytest.mark.parametrize("name", ORDER)
def test_a_training_resumes_from_a_kept_checkpoint(name: str, tmp_path: Path) -> None:
    start = resumed(DATA / name, tmp_path)
    assert start.step == 2
    head = load_file(DATA / name / WEIGHTS)
    assert start.head.keys() == head.keys()
    assert all(torch.equal(start.head[key], head[key]) for key in head)

    state = torch.load(DATA / name / "optimizer.pt", weights_only=True)["state"]
    assert start.moments.keys() == {*ORDER[name]}
    for number, parameter in enumerate(ORDER[name]):
        for key, value in state[number].items():
            assert torch.equal(start.moments[parameter][key], value), (parameter, key)
        assert state[number]["exp_avg"].any()
        # Two steps of two are done, so a linear schedule has come to 0.
        assert start.settings[parameter] == (DECAY.get(parameter, 0.0), 0.0)


def test_an_optimizer_with_other_parameters_says_what_to_do(tmp_path: Path) -> None:
    """They are not taken for the head's."""
    kept = shutil.copytree(DATA / "trainer-0.1.0", tmp_path / "kept")
    saved = torch.load(kept / "optimizer.pt", weights_only=True)
    saved["state"][1]["exp_avg"] = saved["state"][3]["exp_avg"]
    torch.save(saved, kept / "optimizer.pt")
    says = (
        r"optimizer: got groups of \[5, 1\] parameters in .*, want \[1, 1\] and the head's \[2, 2\]"
    )
    with pytest.raises(ValueError, match=says):
        resumed(kept, tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    for name in ("optimizer.pt", "scheduler.pt"):
        (kept / name).unlink()
    start = resumed(kept, tmp_path)
    assert start.step == 2
    assert not any(start.moments.values())


@pytest.mark.parametrize("late", [False, True])
def test_patch_trainer_resumes_what_a_callback_trained(late: bool, tmp_path: Path) -> None:
    """Its optimizer has the head in the groups of the model too."""
    added = PreCallback(hidden_dim=2)
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(build("llava"), tmp_path, [] if late else [added], **saving)
    if late:
        trainer.add_callback(added)
    trainer.train()
    states = {
        name: {k: v.clone() for k, v in trainer.optimizer.state[p].items()}
        for name, p in trainer.model.named_parameters()
    }
    model = build("llava")
    apply_pre(model, hidden_dim=2)
    start = Start()
    with patch_trainer():
        again = trainer_of(model, tmp_path, [start], max_steps=4)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert start.moments.keys() == states.keys()
    for name, state in states.items():
        assert all(torch.equal(start.moments[name][key], value) for key, value in state.items())
    assert states["pre_head.w1"]["exp_avg"].any()


class Module(nn.Module):
    """Stands for the LightningModule whose checkpoint is kept."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.model = build("llava", seed=1)
        apply_pre(self.model, layer, hidden_dim=2)


@pytest.mark.parametrize(
    "path", sorted(DATA.glob("lightning-*/head.ckpt")), ids=lambda path: path.parent.name
)
def test_the_head_of_a_kept_lightning_checkpoint_loads(path: Path) -> None:
    pytest.importorskip("lightning")
    from pre_kernels.integrations.lightning import PreLightningCallback

    checkpoint = torch.load(path, weights_only=True)
    module: Any = Module([1, 3])
    PreLightningCallback().on_load_checkpoint(None, module, checkpoint)
    own = {f"model.pre_head.{name}": p for name, p in module.model.pre_head.named_parameters()}
    assert own.keys() == checkpoint["pre_head"].keys()
    assert all(torch.equal(own[name], kept) for name, kept in checkpoint["pre_head"].items())

    other: Any = Module(2)
    before = other.model.pre_head.w1.detach().clone()
    with pytest.raises(ValueError, match=r"checkpoint: got a head of .*0\.w1.*, want .*head\.w1"):
        PreLightningCallback().on_load_checkpoint(None, other, checkpoint)
    assert torch.equal(other.model.pre_head.w1, before)
    # Without PRe there is nothing to load it into.
    PreLightningCallback().on_load_checkpoint(None, nn.Linear(2, 2), checkpoint)
