"""Attention by flash-attn or torch's kernels: with PRe, a bf16 model is as close to float64 as with
eager attention."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from pre_kernels.integrations import apply_pre

from .support.attached import same_head
from .support.by_hand import expected_gradients, gradients
from .support.tiny.models import Batch, batch, build

LAYERS = [2, 4]
EPS = torch.finfo(torch.bfloat16).eps
needs_flash_attn = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="flash-attn needs a GPU"),
    pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed"),
]


def in_dtype(data: Batch, dtype: torch.dtype, device: torch.device) -> Batch:
    """The batch with its pixels rounded to bfloat16."""
    inputs = {
        name: x.to(device, dtype) if x.is_floating_point() else x.to(device)
        for name, x in data.inputs.items()
    }
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16().to(dtype)
    return Batch(inputs, data.visual.to(device), data.lengths)


def step(family: str, attention: str, device: torch.device) -> tuple[dict[str, Tensor], nn.Module]:
    """(loss and gradients, the head) of a bf16 model with PRe."""
    model = build(family).bfloat16().to(device)
    model.set_attn_implementation(attention)
    assert model.config.get_text_config()._attn_implementation == attention
    handle = apply_pre(model, LAYERS)
    same_head(handle)
    loss = model(**in_dtype(batch(family), torch.bfloat16, device).inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}, handle.head


def in_float64(family: str, head: nn.Module) -> dict[str, Tensor | None]:
    """The same by hand, in float64 and with eager attention, with the same weights."""
    model = build(family).bfloat16().double()
    model.set_attn_implementation("eager")
    data = in_dtype(batch(family), torch.float64, torch.device("cpu"))
    head = copy.deepcopy(head).double().cpu()
    loss, found = expected_gradients(model, family, data, head, LAYERS)
    return {"loss": loss, **found}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize(
    "attention", ["sdpa", pytest.param("flash_attention_2", marks=needs_flash_attn)]
)
def test_as_close_to_float64_as_eager_attention(
    attention: str, family: str, device: torch.device
) -> None:
    grads, head = step(family, attention, device)
    eager, _ = step(family, "eager", device)
    wanted = in_float64(family, head)
    assert grads.keys() == eager.keys() == wanted.keys()
    without = {name for name, gradient in wanted.items() if gradient is None}
    assert {name for name, gradient in grads.items() if gradient is None} == without
    names = wanted.keys() - without - {"loss"}
    of_the_head = sorted(name for name in names if name.startswith("pre_head"))
    for group in (of_the_head, sorted(names - {*of_the_head})):
        truth, ours, theirs = (
            torch.cat([values[name].flatten().double().cpu() for name in group])
            for values in (wanted, grads, eager)
        )
        # Attention that sums in another order changes the rounding of everything after it, so the
        # errors of single tensors differ more than the error rule of the kernels allows.
        bound = 2 * (theirs - truth).norm() + 0.5 * EPS * truth.norm()
        assert 0 < (ours - truth).norm() < bound < 0.3 * truth.norm()
    loss, ours, theirs = (float(values["loss"]) for values in (wanted, grads, eager))
    assert abs(ours - loss) <= abs(theirs - loss) + 2 * EPS * abs(loss)
