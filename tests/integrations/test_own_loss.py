"""Models that are not Hugging Face's: other names for labels, a loss that the user adds, and other
ways of saving."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from pre_kernels import reference
from pre_kernels.integrations import apply_pre

from .support.by_hand import assert_same_gradients, expected_gradients, gradients
from .support.tiny.models import batch, build
from .support.tiny.nanovlm_like import IMAGE, OPTIONS, Small, small


def by_hand(model: Small, inputs: dict[str, Tensor], head: dict[str, Tensor]) -> Tensor:
    """The loss of `model` without PRe, plus 0.5 · L_PRe."""
    seen: dict[int, Tensor] = {}
    for number in (0, 2):
        model.decoder.blocks[number].register_forward_pre_hook(
            lambda module, args, number=number: seen.update({number: args[0]})
        )
    loss = model(**inputs)[1]
    visual = inputs["input_ids"] == IMAGE
    return loss + 0.5 * reference.pre_loss(
        seen[2][visual], seen[0][visual].detach(), *head.values()
    )


@pytest.mark.parametrize("way", ["targets", "loss()"])
def test_loss_and_gradients(way: str) -> None:
    model, inputs = small()
    plain = copy.deepcopy(model)
    handle = apply_pre(model, labels="targets" if way == "targets" else None, **OPTIONS)
    head = {
        name: getattr(handle.head, name).detach().clone().requires_grad_()
        for name in ("w1", "b1", "w2", "b2")
    }
    loss = model(**inputs)[1]
    if way == "loss()":
        loss = loss + handle.loss()
        assert handle.loss() == 0  # each term is returned once
    loss.backward()
    wanted = by_hand(plain, inputs, head)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    expected = gradients(plain) | {f"pre_head.{name}": p.grad for name, p in head.items()}
    assert_same_gradients(gradients(model), expected)
    assert handle.metrics()["pre_tokens"] == 3


def test_a_huggingface_model_whose_loss_is_the_users() -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model, labels=None)
    loss = model(**data.inputs).loss + handle.loss()
    loss.backward()
    wanted, expected = expected_gradients(build("llava"), "llava", data, handle.head, [2])
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(gradients(model), expected)
    with torch.no_grad():
        model(**data.inputs)
    assert handle.loss() == 0
    model.eval()(**data.inputs)
    assert handle.loss() == 0


def loop(model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            model(**inputs)[1].backward()
    return [text for w in caught if (text := str(w.message)).startswith("PRe: ")]


def test_a_loss_that_is_not_added_is_said() -> None:
    model, inputs = small()
    apply_pre(model, labels=None, **OPTIONS)
    said = loop(model, inputs)
    assert len(said) == 1
    assert "never back-propagated" in said[0]
    assert said[0].endswith("add handle.loss() to the loss")


def test_other_targets_than_labels_are_said() -> None:
    """Without `labels=` the forwards have no argument of that name, and never run the head."""
    model, inputs = small()
    handle = apply_pre(model, **OPTIONS)
    said = loop(model, inputs)
    assert len(said) == 1
    assert "name their argument with apply_pre(labels=...)" in said[0]
    assert handle.metrics()["pre_forwards"] == 0


def test_errors() -> None:
    model, _ = small()
    with pytest.raises(
        ValueError, match=r"Small has no .config; want a Hugging Face .*, or pass layers="
    ):
        apply_pre(model)
    with pytest.raises(ValueError, match=r"config names no visual tokens"):
        apply_pre(model, layers="decoder.blocks")
    model.others = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"hidden_size None, want an int; and Linear has no norm"):
        apply_pre(model, layers="others", mask_fn=OPTIONS["mask_fn"])
    with pytest.raises(TypeError, match=r"labels: got int, want the name"):
        apply_pre(model, labels=3, **OPTIONS)
    handle = apply_pre(model, labels="targets", **OPTIONS)
    with pytest.raises(
        RuntimeError, match=r"labels: is 'targets', so L_PRe is added to output.loss"
    ):
        handle.loss()


def test_a_loss_that_nobody_asked_for_is_gone() -> None:
    """A later forward in eval mode, or with PRe off, has no term, and the graph of the earlier
    forward is not kept."""
    model, inputs = small()
    handle = apply_pre(model, labels=None, **OPTIONS)
    for off in ("eval", "enabled"):
        model.train()
        handle.enabled = True
        model(**inputs)
        if off == "eval":
            model.eval()
        else:
            handle.enabled = False
        model(**inputs)
        assert not handle.loss().requires_grad
    model.train()
    handle.enabled = True
    model(**inputs)
    with torch.no_grad():  # a reference, as users keep them
        model(**inputs)
    assert handle.loss().requires_grad


def test_a_save_pretrained_of_the_models_own(tmp_path: Path) -> None:
    model, _ = small()
    keys = model.state_dict().keys()
    handle = apply_pre(model, **OPTIONS)
    copied = copy.deepcopy(model)
    for number, saved in enumerate((model, copied)):
        folder = tmp_path / str(number)
        folder.mkdir()
        saved.save_pretrained(folder)
        assert load_file(folder / "model.safetensors").keys() == keys
        assert "pre_head.w1" in saved.state_dict()
    handle.remove()
    assert "save_pretrained" not in vars(model)


def test_the_head_is_excluded_on_request(tmp_path: Path) -> None:
    """`accelerator.save_model` calls state_dict(), and so does everyone who saves by hand."""
    model = build("llava")
    keys = model.state_dict().keys()
    handle = apply_pre(model)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    around = nn.ModuleDict({"inner": model})
    with handle.excluded():
        accelerator.save_model(prepared, tmp_path)
        assert model.state_dict().keys() == keys
        assert not any("pre_head" in key for key in around.state_dict())
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() <= keys
    assert not any("pre_head" in key for key in saved)
    assert "pre_head.w1" in model.state_dict()
    assert "inner.pre_head.w1" in around.state_dict()
