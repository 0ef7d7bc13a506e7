"""The head's dtype: float32 weights over a half-precision model, and a head that others cast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pre_kernels.integrations import apply_pre, patch_trainer

from .support.by_hand import copy_of
from .support.tiny.models import batch, build
from .support.tiny.training import make
from .support.warned import said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_head_over_a_half_precision_model(dtype: torch.dtype) -> None:
    data = batch("llava")
    data.inputs["pixel_values"] = data.inputs["pixel_values"].to(dtype)
    grads = {}
    for head_dtype in (None, torch.float32):
        model = build("llava").to(dtype)
        torch.manual_seed(5)
        handle = apply_pre(model, head_dtype=head_dtype)
        with torch.no_grad():  # the same in both dtypes
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
        grads[head_dtype] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, gradient in grads[None].items():
        other = grads[torch.float32][name]
        assert other.dtype == (torch.float32 if name.startswith("pre_head") else dtype)
        torch.testing.assert_close(
            other.to(dtype), gradient, rtol=4 * torch.finfo(dtype).eps, atol=1e-5
        )


@pytest.mark.parametrize("given", [None, torch.float32])
def test_others_recast_the_head(given: Any, tmp_path: Path) -> None:
    """TRL does this with every trainable parameter of a quantised model."""
    model = build("llava").bfloat16() if given is not None else build("llava")
    handle = apply_pre(model, head_dtype=given)
    for parameter in handle.head.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    rounded = copy_of(handle.head)
    trainer = make(tmp_path, model, learning_rate=0.0)
    with patch_trainer():
        texts = said(trainer.train)
    assert texts == [
        "PRe: the head's w1, b1, w2, b2 were cast to torch.bfloat16 after apply_pre; they were "
        "cast back to torch.float32"
    ]
    for name, parameter in handle.head.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, rounded[name].float())


def test_a_head_that_was_cast_with_its_model_stays(tmp_path: Path) -> None:
    """Without head_dtype the head has the dtype of its layer."""
    model = build("llava")
    handle = apply_pre(model)
    model.bfloat16()
    with patch_trainer():
        assert said(make(tmp_path, model, learning_rate=0.0).train) == []
    assert {p.dtype for p in handle.head.parameters()} == {torch.bfloat16}


def test_the_head_of_a_quantised_layer_has_the_layers_dtype() -> None:
    """PEFT's adapters over quantised weights are float32, whatever dtype the layer computes in."""
    model = build("llava").bfloat16()
    for module in model.model.language_model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.data.to(torch.int8), requires_grad=False)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*_proj"))
    adapter = (
        peft.base_model.model.model.language_model.layers[2]
        .self_attn.q_proj.lora_A["default"]
        .weight
    )
    adapter.data = adapter.data.float()
    assert apply_pre(peft).head.w1.dtype == torch.bfloat16
