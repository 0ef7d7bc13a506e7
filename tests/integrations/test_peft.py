"""PEFT: attach to the PeftModel. Wrapping the base model after attaching is an error, because its
head would never train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pre_kernels.integrations import apply_pre, find_handle

from .support.by_hand import assert_same_gradients, copy_of, gradients, pre_loss, watch
from .support.tiny.models import batch, build

BASE = "base_model.model."


def lora(model: Any, **more: Any) -> Any:
    torch.manual_seed(3)
    peft = get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*language_model.*\.[qv]_proj", **more)
    )
    # B starts at 0, which would hide the gradient of A.
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return peft.train()


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_attached_to_the_peft_model(family: str, reentrant: bool | None) -> None:
    model = lora(build(family))
    data = batch(family)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    handle = apply_pre(model)
    assert handle.head is model.pre_head
    loss = model(**data.inputs).loss
    loss.backward()

    plain = lora(build(family))
    seen = watch(plain, family, BASE)
    head = copy_of(handle.head)
    wanted = plain(**data.inputs).loss + 0.5 * pre_loss(seen, data, [2], head)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    expected = gradients(plain) | {f"pre_head.{name}": p.grad for name, p in head.items()}
    assert_same_gradients(gradients(model), expected)


def test_a_base_whose_hooks_are_passed_by() -> None:
    """Up to version 0.20 a PeftModel calls the `forward` of its base, so hooks on the base itself
    would not be called."""
    wanted = lora(build("llava"))
    apply_pre(wanted)
    model = lora(build("llava"))
    inputs = batch("llava").inputs
    base = model.get_base_model()
    model.forward = lambda **kwargs: base.forward(**kwargs)
    apply_pre(model)
    assert model(**inputs).loss == wanted(**inputs).loss


def test_saved_adapter_has_no_head(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    model = lora(build("llava"))
    model.save_pretrained(tmp_path / "plain")
    handle = apply_pre(model)
    model.save_pretrained(tmp_path / "attached")
    plain, attached = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "attached")
    )
    assert plain.keys() == attached.keys()
    handle.remove()
    assert find_handle(model) is None
    assert not hasattr(model, "pre_head")


@pytest.mark.parametrize(
    ("layer", "other"), [(2, ', or put "pre_head" in modules_to_save'), ([1, 2], "")]
)
def test_wrapped_after_attaching(layer: Any, other: str) -> None:
    model = build("llava")
    data = batch("llava")
    apply_pre(model, layer)
    peft = lora(model)
    with pytest.raises(
        RuntimeError, match=rf"wrapped in PEFT after apply_pre.*on the PeftModel instead{other}$"
    ):
        peft(**data.inputs)


def test_wrapped_after_attaching_with_modules_to_save(tmp_path: Any) -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    peft = lora(model, modules_to_save=["pre_head"])
    peft(**data.inputs).loss.backward()
    trained = [
        name for name, p in peft.named_parameters() if p.grad is not None and "pre_head" in name
    ]
    assert len(trained) == 4
    assert all("modules_to_save" in name for name in trained)
    handle.save(tmp_path)
    fresh = apply_pre(build("llava", seed=4))
    fresh.load(tmp_path)
    assert torch.equal(fresh.head.w1, handle.head.modules_to_save["default"].w1)


def test_the_head_is_nothing_that_all_linear_wraps() -> None:
    model = build("llava")
    apply_pre(model)
    names = [
        n
        for n, _ in get_peft_model(
            model, LoraConfig(r=2, target_modules="all-linear")
        ).named_parameters()
    ]
    assert any("lora" in name for name in names)
    assert [name.rpartition(".")[2] for name in names if "pre_head" in name] == [
        "w1",
        "b1",
        "w2",
        "b2",
    ]


def test_a_head_frozen_on_purpose_is_fine() -> None:
    model = lora(build("llava"))
    data = batch("llava")
    handle = apply_pre(model)
    handle.head.requires_grad_(False)
    model(**data.inputs).loss.backward()
    assert handle.head.w1.grad is None
