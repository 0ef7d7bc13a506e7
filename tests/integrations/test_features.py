"""Features that may be combined with PRe: EMA, packing, quantised bases, LoRA, resuming, export."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from pre_kernels.integrations import apply_pre, find_handle, patch_trainer

from .support.attached import same_head
from .support.by_hand import gradients
from .support.tiny.models import batch, build
from .support.tiny.training import EQUAL, InOrder, Samples, arguments, collate, one_image, train

LORA = LoraConfig(r=2, target_modules=r".*language_model.*\.[qv]_proj")


def test_ema_copies_model_and_head() -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    other = find_handle(average.module)
    assert other is not None
    assert other is not handle
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first = handle.head.w1.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        model(**data.inputs).loss.backward()
        optimizer.step()
        average.update_parameters(model)
        if step == 0:
            # The first update copies the parameters.
            assert torch.equal(other.head.w1, handle.head.w1)
            second = handle.head.w1.detach().clone()
    torch.testing.assert_close(other.head.w1, 0.5 * second + 0.5 * handle.head.w1)
    assert not torch.equal(first, second)

    before = handle.metrics(reset=False)
    seen = other.metrics()["pre_forwards"]
    model.zero_grad()
    # The hooks of the copy must reach only the head of the copy.
    average.module(**data.inputs).loss.backward()
    assert handle.metrics() == before
    assert (seen, other.metrics()["pre_forwards"]) == (0, 1)
    assert handle.head.w1.grad is None


def packed(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Samples one after the other in a row (1, total) without padding. In each, positions restart
    and the first label is ignored."""
    ids = torch.cat([p["input_ids"] for p in parts], 1)
    for part in parts:
        part["labels"][:, 0] = -100
    return {
        "input_ids": ids,
        "labels": torch.cat([p["labels"] for p in parts], 1),
        "position_ids": torch.cat([torch.arange(p["input_ids"].shape[1]) for p in parts])[None],
        "pixel_values": torch.cat([p["pixel_values"] for p in parts]),
    }


@pytest.mark.parametrize("level", ["patch", "image"])
def test_a_packed_row_is_its_samples(level: str) -> None:
    samples = [
        [("text", 2), ("image", 8, 8), ("text", 5)],
        [("image", 8, 8), ("text", 3), ("image", 8, 8)],
    ]
    parts = [batch("llava", [sample], seed=i).inputs for i, sample in enumerate(samples)]
    model = build("llava")
    handle = apply_pre(model, level=level)
    same_head(handle)
    model(**packed(parts), use_cache=False).loss.backward()
    assert handle.metrics()["pre_tokens"] == 12
    grads = {n: p.grad.clone() for n, p in handle.head.named_parameters()}

    model.zero_grad()
    terms = [4, 8] if level == "patch" else [1, 2]
    with handle.defer(float(sum(terms))) as deferred:
        for part in parts:
            model(**part, use_cache=False)
    deferred.take().backward()
    for name, parameter in handle.head.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=2e-4, atol=1e-7)


class Int8Linear(nn.Module):
    """A frozen linear layer with int8 weights and one scale per row; a stand-in for bitsandbytes if
    that is missing."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        scale = like.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (like.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.in_features, self.out_features = like.in_features, like.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def nf4(like: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(like.in_features, like.out_features, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        like.weight.data.clone(), requires_grad=False, quant_type="nf4"
    )
    return layer.to("cpu")


@pytest.mark.parametrize("quantise", [Int8Linear, nf4])
def test_a_quantised_base(quantise: Any) -> None:
    """The head has the dtype of the layer's norms, and the gradient passes through frozen integer
    weights to the adapters below."""
    model = build("llava")
    data = batch("llava")
    for layer in model.model.language_model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, quantise(getattr(layer.mlp, name)))
    model.requires_grad_(False)
    peft = get_peft_model(model, LORA).train()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    handle = apply_pre(peft, weight=1.0)
    assert {p.dtype for p in handle.head.parameters()} == {torch.float32}
    peft(**data.inputs).loss.backward()
    both = gradients(peft)
    peft.zero_grad()
    handle.enabled = False
    peft(**data.inputs).loss.backward()
    changed = {
        n for n, g in gradients(peft).items() if g is not None and not torch.equal(g, both[n])
    }
    below = {n for n in both if "lora" in n and any(f"layers.{i}." in n for i in (0, 1))}
    assert changed == below
    trained = {n for n, g in both.items() if g is not None}
    assert trained == {n for n in both if "lora" in n or n.startswith("pre_head")}


@pytest.mark.parametrize("how", ["after", "modules_to_save"])
def test_lora_under_the_trainer(how: str, tmp_path: Path) -> None:
    """Adapter and head are saved side by side, merge back into a plain model, and resume
    together."""
    saving = {"save_strategy": "steps", "save_steps": 2}

    def fresh() -> Any:
        model = build("llava")
        if how == "after":
            peft = get_peft_model(model, LORA)
            return peft, apply_pre(peft)
        handle = apply_pre(model)
        config = LoraConfig(r=2, target_modules=LORA.target_modules, modules_to_save=["pre_head"])
        return get_peft_model(model, config), handle

    runs = []
    for stop, resume in ((4, None), (4, str(tmp_path / "checkpoint-2"))):
        peft, handle = fresh()
        same_head(handle)
        with patch_trainer():
            trainer = InOrder(
                model=peft,
                args=arguments(tmp_path, 2, 2, max_steps=stop, **saving),
                train_dataset=Samples(EQUAL),
                data_collator=collate("llava", EQUAL),
            )
            trainer.train(resume_from_checkpoint=resume)
        runs.append({n: p.detach().clone() for n, p in peft.named_parameters() if p.requires_grad})
    assert any("pre_head" in name for name in runs[0])
    assert runs[0].keys() == runs[1].keys()
    for name, parameter in runs[0].items():
        assert torch.equal(parameter, runs[1][name]), name

    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert any("lora" in name for name in saved)
    assert any("pre_head" in name for name in saved) == (how == "modules_to_save")
    assert (tmp_path / "checkpoint-4" / "pre_head.safetensors").exists()
    handle.remove()
    merged = peft.merge_and_unload()
    assert not any("pre_head" in name or "lora" in name for name in merged.state_dict())
    assert merged.state_dict().keys() == build("llava").state_dict().keys()
    assert merged(**batch("llava").inputs).loss is not None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_four_and_four_steps_are_eight(family: str, tmp_path: Path) -> None:
    """Losses and weights agree bit for bit, although `save_pretrained` renames keys and the Trainer
    does not undo that."""
    samples = [one_image(n) for n in (5, 4, 3, 6, 2, 5, 3, 4)] * 2
    more = {
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 8,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }
    more |= {"lr_scheduler_type": "cosine", "logging_steps": 1}
    curves, ends = [], []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        # Resumed by a script that has only the checkpoint.
        model = build(family, seed=0 if resume is None else 7)
        apply_pre(model, schedule="cosine")
        with patch_trainer():
            trainer = InOrder(
                model=model,
                args=arguments(tmp_path, 2, 1, **more),
                train_dataset=Samples(samples),
                data_collator=collate(family, samples),
            )
            trainer.train(resume_from_checkpoint=resume)
        names = ("loss", "pre_loss", "pre_weight", "pre_head_grad_norm", "grad_norm")
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        curves.append([[entry.get(name) for name in names] for entry in logs])
        ends.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert len(curves[0]) == 8
    assert curves[0] == curves[1]
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name


def test_what_the_trainer_saves(tmp_path: Path) -> None:
    """The files of the model are those of a training without PRe, and load without missing or
    unexpected keys."""
    from safetensors.torch import load_file

    saving = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.0}
    plain = build("llava")
    without = InOrder(
        model=plain,
        args=arguments(tmp_path / "plain", 2, 2, learning_rate=0.0),
        train_dataset=Samples(EQUAL),
        data_collator=collate("llava", EQUAL),
    )
    without.train()  # training writes into the config
    without.save_model(tmp_path / "plain")
    plain = build("llava")
    _, handle, trainer = train("llava", EQUAL, tmp_path / "run", 2, patched=True, **saving)
    with patch_trainer():
        trainer.save_model(tmp_path / "saved")
    wanted = load_file(tmp_path / "plain" / "model.safetensors")
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-1"):
        assert (folder / "config.json").read_bytes() == (
            tmp_path / "plain" / "config.json"
        ).read_bytes()
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights.items())
        loaded, info = type(plain).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert loaded.state_dict().keys() == plain.state_dict().keys()
        again = apply_pre(loaded)
        again.load(folder)
        assert torch.equal(again.head.w1, handle.head.w1)
    assert json.loads((tmp_path / "saved" / "pre_head.json").read_text())["layers"] == [2]


PICKLES = "safe_serialization" in inspect.signature(PreTrainedModel.save_pretrained).parameters


@pytest.mark.parametrize(
    "options", [{"safe_serialization": False}] if PICKLES else [{"max_shard_size": "20KB"}]
)
def test_other_ways_of_saving(options: dict[str, Any], tmp_path: Path) -> None:
    """transformers 4 can still write pickles of its own. Later versions write safetensors, here
    into several files."""
    model = build("llava")
    names = []
    for folder in (tmp_path / "plain", tmp_path / "attached"):
        model.save_pretrained(folder, **options)
        if PICKLES:
            names.append(set(torch.load(folder / "pytorch_model.bin", weights_only=True)))
        else:
            names.append(
                set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
            )
        if len(names) == 1:
            apply_pre(model)
    assert names[0] == names[1]
    assert len(names[0]) > 40
