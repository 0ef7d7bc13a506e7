"""Vision-language-action models: patches that `input_ids` does not show, and layers that the model
computes by hand. The code of docs/training.md is compared with the equation in float64."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from pre_kernels.integrations import apply_pre, patch_trainer
from verify import ROOT

from .support.by_hand import assert_same_gradients, copy_of, gradients
from .support.scripts import under_the_launcher
from .support.tiny.interleaved import PATCHES as OF_POLICY
from .support.tiny.interleaved import TEXT, norms, policy, prefix
from .support.tiny.models import DEPTH, WIDTH, batch, build
from .support.tiny.openvla_like import PATCHES, VISION, openvla_batch, openvla_like, visual
from .support.tiny.training import Recorder, arguments
from .support.warned import said

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def documented(names: dict[str, Any], number: int) -> dict[str, Any]:
    """The names after the first `number` blocks of the page's section, run with `names`."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.split("\n## Vision-language-action models\n")[1].split("\n## ")[0]
    names = {"torch": torch, "apply_pre": apply_pre, **names}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:number]:
        exec(code.split("handle = ")[0], names)
    return names


def eager(hidden: Tensor, anchor: Tensor, head: dict[str, Tensor]) -> Tensor:
    """L_PRe of rows (N, d) and their targets (N, z)."""
    predicted = F.linear(hidden, head["w1"], head["b1"])
    predicted = F.linear(F.gelu(predicted), head["w2"], head["b2"])
    return -F.cosine_similarity(predicted, anchor.detach(), dim=-1).mean()


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def states(model: nn.Module) -> dict[int, Tensor]:
    """The inputs of the decoder's layers in the last forward, by the number of layers before."""
    seen: dict[int, Tensor] = {}
    for number, layer in enumerate(model.language_model.model.layers):
        layer.register_forward_pre_hook(lambda m, args, n=number: seen.update({n: args[0]}))
    return seen


def expected(
    plain: nn.Module, inputs: dict[str, Tensor], head: dict[str, Tensor], term: Any
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients with 0.5 · L_PRe, which `term` computes from the states of the layers."""
    seen = states(plain)
    loss = plain(**inputs).loss + 0.5 * term(seen)
    loss.backward()
    return loss, gradients(plain) | {f"pre_head.{name}": p.grad for name, p in head.items()}


@pytest.mark.parametrize("case", ["one image", "two images", "state", "level", "projector"])
def test_openvla(case: str) -> None:
    model = openvla_like().double()
    inputs = doubled(openvla_batch(images=1 if case == "one image" else 2))
    if case == "state":
        inputs["proprio"] = torch.randn(2, WIDTH, dtype=torch.double)
    plain = copy.deepcopy(model)
    page = documented({"vla": model}, 2)
    options = {}
    if case == "level":
        options = {"level": "image"}
    if case == "projector":
        options = {"anchor": page["anchor"], "anchor_dim": VISION}
    handle = apply_pre(model, 2, mask_fn=page["visual"], **options)
    head = copy_of(handle.head)
    rows = visual(inputs)
    images = int(rows[0].sum()) // PATCHES
    assert rows.sum() == 2 * images * PATCHES

    def term(seen: dict[int, Tensor]) -> Tensor:
        hidden, anchor = seen[2][rows], seen[0][rows]
        if case == "level":
            hidden, anchor = (x.unflatten(0, (-1, PATCHES)).mean(1) for x in (hidden, anchor))
        if case == "projector":
            anchor = plain.vision_backbone(inputs["pixel_values"]).flatten(0, 1)
        return eager(hidden, anchor, head)

    loss = model(**inputs).loss
    loss.backward()
    wanted, wanted_gradients = expected(plain, inputs, head, term)
    torch.testing.assert_close(loss, wanted, **EXACT)
    assert_same_gradients(gradients(model), wanted_gradients, **EXACT)
    assert (
        handle.metrics()["pre_tokens"]
        == rows.sum()
        == handle.count(inputs) * (PATCHES if case == "level" else 1)
    )


def test_openvla_images_have_numbers_of_their_own() -> None:
    inputs = openvla_batch(samples=3, images=2)
    page = documented({"vla": openvla_like()}, 1)
    numbers = page["visual"](inputs)
    assert torch.equal(numbers > 0, visual(inputs))
    images = numbers[numbers > 0].view(-1, PATCHES)
    assert torch.equal(images, torch.arange(1, 7)[:, None].expand(-1, PATCHES))
    text = openvla_batch(images=0)
    assert torch.equal(page["visual"](text), torch.zeros_like(text["input_ids"]))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_spatial_forcing(lora: bool) -> None:
    """Layer 24 of 32, a frozen encoder's features, states one row later, a loss outside."""
    width = 10
    model = openvla_like(layers=32)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    model = model.double()
    inputs = doubled(openvla_batch(images=2))
    inputs["proprio"] = torch.randn(2, WIDTH, dtype=torch.double)
    features = torch.randn(2, 2 * PATCHES, width, dtype=torch.double)
    plain = copy.deepcopy(model)
    page = documented({"vla": model, "vggt": lambda pixels: features, "width": width}, 3)
    handle = apply_pre(
        model,
        layer=24,
        weight=0.5,
        hidden_dim=width,
        mask_fn=lambda inputs: page["visual"](inputs, shift=1),
        anchor=page["targets"],
        anchor_dim=width,
        labels=None,
    )
    head = copy_of(handle.head)
    outside = lambda output: output.hidden_states[-1].abs().mean()  # noqa: E731
    loss = outside(model(**inputs, output_hidden_states=True)) + handle.loss()
    loss.backward()

    output = plain(**inputs, output_hidden_states=True)
    length = 2 * PATCHES
    hidden = output.hidden_states[24][:, 2 : 2 + length].flatten(0, 1)
    term = eager(hidden, features.flatten(0, 1), head)
    wanted = outside(output) + 0.5 * term
    wanted.backward()
    torch.testing.assert_close(loss, wanted, **EXACT)
    found = gradients(model)
    assert_same_gradients(
        found, gradients(plain) | {f"pre_head.{name}": p.grad for name, p in head.items()}, **EXACT
    )
    trained = [name for name, gradient in found.items() if gradient is not None]
    assert all("lora_" in name or "pre_head" in name for name in trained) is lora


class Batches(torch.utils.data.IterableDataset):
    """Micro-batches with one image for each sample, with two, and without."""

    MICRO = (1, 2, 0)

    def __iter__(self) -> Any:
        yield from (openvla_batch(images=n, seed=n) for n in self.MICRO)


def trained(model: nn.Module, folder: Path, steps: int = 1) -> tuple[Recorder, Trainer]:
    recorder = Recorder()
    trainer = Trainer(
        model=model,
        args=arguments(folder, len(Batches.MICRO), 1, max_steps=steps),
        train_dataset=Batches(),
        data_collator=lambda drawn: drawn[0],
        callbacks=[recorder],
    )
    trainer.train()
    return recorder, trainer


def test_openvla_under_a_trainer(tmp_path: Path) -> None:
    """Every patch of the step weighs the same, and the text-only micro-batch has none."""
    model = openvla_like()
    plain = copy.deepcopy(model)
    page = documented({"vla": model}, 1)
    handle = apply_pre(model, mask_fn=page["visual"])
    head = copy_of(handle.head)
    with patch_trainer():
        recorder, trainer = trained(model, tmp_path)
    tokens = 2 * PATCHES * 3
    assert trainer.state.log_history[0]["pre_tokens"] == tokens
    seen = states(plain)
    for inputs in Batches():
        loss = plain(**inputs).loss / 3
        rows = visual(inputs)
        if rows.any():
            term = eager(seen[2][rows], seen[0][rows], head)
            loss = loss + 0.5 * term * rows.sum() / tokens
        loss.backward()
    wanted = gradients(plain) | {f"pre_head.{name}": p.grad for name, p in head.items()}
    assert_same_gradients(recorder.steps[0], wanted, atol=5e-6)


def test_openvla_without_pre_again(tmp_path: Path) -> None:
    """After `remove` the model trains bit for bit as one that never had PRe, and so it does at
    λ = 0."""
    model, plain, off = openvla_like(), openvla_like(), openvla_like()
    page = documented({"vla": model}, 1)
    with patch_trainer():
        with apply_pre(model, mask_fn=page["visual"]):
            trained(model, tmp_path)
        plain.load_state_dict(model.state_dict())
        off.load_state_dict(model.state_dict())
        apply_pre(off, weight=0.0, mask_fn=page["visual"])
        recorders = [trained(each, tmp_path, steps=2)[0] for each in (model, off)]
    recorders.append(trained(plain, tmp_path, steps=2)[0])
    without = recorders.pop().steps
    assert list(plain.state_dict()) == list(model.state_dict())
    for recorder in recorders:
        for step, wanted in zip(recorder.steps, without, strict=True):
            assert step.keys() == wanted.keys()
            assert all(torch.equal(step[name], wanted[name]) for name in wanted)


def test_openvla_by_the_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.py").write_text(
        "from tests.integrations.support.tiny.openvla_like import visual\n"
    )
    run = under_the_launcher(tmp_path)
    body = """
    from tests.integrations.test_vla import openvla_like, trained
    found = trained(openvla_like(), out)[1]
    (out / "log").write_text(json.dumps(found.state.log_history[0]))
    """
    run(body, "--layer", "2")
    assert "pre_tokens" not in json.loads((tmp_path / "out" / "log").read_text())
    assert "give the launcher --set mask_fn=module:function" in capsys.readouterr().err
    run(body, "--layer", "2", "--set", "mask_fn=page:visual")
    assert json.loads((tmp_path / "out" / "log").read_text())["pre_tokens"] == 2 * PATCHES * 3
    assert "PRe: attached to OpenVLALike: layer 2 of 4" in capsys.readouterr().err


BY_HAND = {"mask_fn": prefix, "labels": "batch"}


def test_layers_by_hand_are_an_error() -> None:
    """At the first forward, before anything is trained."""
    model, data = policy()
    handle = apply_pre(model, text_model=TEXT, **BY_HAND)
    with pytest.raises(
        RuntimeError,
        match=r"layers: got decoder layers \(LlamaDecoderLayer\) that this forward did not call, "
        r".* such as SmolVLA and pi0, calls at least their norms: apply_pre\(layers=\[",
    ):
        model(data)
    handle.remove()
    assert model(data)[0].requires_grad


@pytest.mark.parametrize("way", ["modules", "paths", "checkpointed"])
def test_norms_in_place_of_layers(way: str) -> None:
    model, data = policy()
    model = model.double()
    data = doubled(data)
    plain = copy.deepcopy(model)
    names = [f"{TEXT}.layers.{i}.input_layernorm" for i in range(DEPTH)] + [f"{TEXT}.norm"]
    page = documented({"policy": model, "vla": openvla_like()}, 4)
    assert page["norms"] == [model.get_submodule(name) for name in names]
    handle = apply_pre(
        model, [1, DEPTH], layers=names if way == "paths" else page["norms"], **BY_HAND
    )
    model.model.vlm_with_expert.checkpointing = way == "checkpointed"
    assert handle.depth == DEPTH
    heads = copy_of(handle.head)
    loss, _ = model(data)
    loss.backward()

    seen = {}
    for number, name in enumerate(names):
        plain.get_submodule(name).register_forward_pre_hook(
            lambda m, args, n=number: seen.update({n: args[0][:, :OF_POLICY].flatten(0, 1)})
        )
    wanted, _ = plain(data)
    for index, number in enumerate((1, DEPTH)):
        head = {name[2:]: p for name, p in heads.items() if name.startswith(f"{index}.")}
        wanted = wanted + 0.25 * eager(seen[number], seen[0], head)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, **EXACT)
    assert_same_gradients(
        gradients(model),
        gradients(plain) | {f"pre_head.{name}": p.grad for name, p in heads.items()},
        **EXACT,
    )
    handle.remove()
    assert gradients(model).keys() == gradients(plain).keys()


def test_lists_that_are_no_layers() -> None:
    model, _ = policy()
    few = norms(model)[:-1]
    with pytest.raises(ValueError, match=r"layer: got 4, want 1\.\.3 "):
        apply_pre(model, DEPTH, layers=few, **BY_HAND)
    for layers, error, message in (
        (few[:1], TypeError, "layers: got list, want a module of the model or its path"),
        ([few[0], 3], TypeError, "layers: got list"),
        ([3, *few], TypeError, "layers: got int, want a module of the model"),
        ([*few, nn.Identity()], ValueError, "layers: got a Identity that is not part of"),
        ([*few, "norms"], ValueError, "layers: got 'norms', which is not a module"),
    ):
        with pytest.raises(error, match=message):
            apply_pre(model, layers=layers, **BY_HAND)
    assert not hasattr(model, "pre_head")


def loop(model: nn.Module, call: Any, steps: int = 5, optimizers: int = 1) -> list[str]:
    """PRe's warnings in a training whose loss is that of `call`."""

    def train() -> None:
        parts = [list(model.parameters())[i::optimizers] for i in range(optimizers)]
        each = [torch.optim.SGD(part, lr=0.01) for part in parts]
        for _ in range(steps):
            call().backward()
            for optimizer in each:
                optimizer.step()
                optimizer.zero_grad()

    return said(train)


NOT_CALLED = (
    r"PRe: the optimizer trains {}, to which PRe is attached, but the last steps had no call"
)


@pytest.mark.parametrize("part", ["vlm", "policy"])
def test_a_model_that_is_never_called(part: str) -> None:
    """Neither the SmolVLM that the policy computes by hand, nor a policy whose `forward` is called
    directly, as LeRobot's loop does."""
    model, data = policy()
    if part == "vlm":
        apply_pre(model.model.vlm_with_expert.vlm)
        found = loop(model, lambda: model(data)[0])
    else:
        apply_pre(model, text_model=TEXT, **BY_HAND)
        found = loop(model, lambda: model.forward(data)[0])
    assert len(found) == 1
    name = "SmolVLMForConditionalGeneration" if part == "vlm" else "Policy"
    assert re.match(NOT_CALLED.format(name), found[0])


def test_a_direct_forward_of_layers_that_are_called() -> None:
    """Their own warning is enough."""
    model = build("llava")
    apply_pre(model)
    inputs = batch("llava").inputs
    found = loop(model, lambda: model.forward(**inputs).loss)
    assert len(found) == 1
    assert "the text model ran in training outside a call of" in found[0]


@pytest.mark.parametrize("case", ["healthy", "many optimizers", "two steps", "off", "another"])
def test_models_that_are_called(case: str) -> None:
    model, data = policy()
    handle = apply_pre(model, layers=norms(model), **BY_HAND)
    if case == "two steps":  # each step of a state that is loaded, for instance
        assert not loop(model, lambda: model.forward(data)[0], steps=2)
    if case == "off":
        handle.enabled = False
        assert not loop(model, lambda: model.forward(data)[0])
        handle.enabled = True
    if case == "another":
        other = nn.Linear(2, 2)
        assert not loop(other, lambda: other(torch.ones(2)).sum())
    assert not loop(model, lambda: model(data)[0], optimizers=7 if "many" in case else 1)


def test_a_call_that_a_graph_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = policy()
    apply_pre(model, layers=norms(model), **BY_HAND)
    with monkeypatch.context() as patch:
        patch.setattr("pre_kernels.integrations.head_checks.capturing", lambda: True)
        model(data)
    assert not loop(model, lambda: model.forward(data)[0])


def test_a_loop_that_stops_calling_the_model() -> None:
    model, data = policy()
    apply_pre(model, layers=norms(model), **BY_HAND)
    calls = iter([model, model, *[model.forward] * 3])
    found = loop(model, lambda: next(calls)(data)[0])
    assert len(found) == 1
    assert re.match(NOT_CALLED.format("Policy"), found[0])
