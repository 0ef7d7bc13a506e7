"""The model around the handle: after removal, saving, loading and copying it is as it was."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from pre_kernels.integrations import apply_pre, find_handle

from .support.attached import every_family
from .support.tiny.models import batch, build


def fingerprint(model: nn.Module) -> Any:
    """The state-dict keys, hooks, attributes and submodules of every module."""
    hooks = (
        "_forward_pre_hooks",
        "_forward_hooks",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    )
    modules = {
        name: (sorted(vars(m)), [len(getattr(m, h)) for h in hooks])
        for name, m in model.named_modules()
    }
    ignored = getattr(model, "_keys_to_ignore_on_save", None)
    return list(model.state_dict()), modules, None if ignored is None else sorted(ignored)


@every_family
def test_remove_restores_the_model(family: str) -> None:
    model = build(family)
    data = batch(family)
    loss = model(**data.inputs).loss  # a first forward may set attributes
    before = fingerprint(model)
    with apply_pre(model, [1, 2]) as handle:
        assert find_handle(model) is handle
        assert model(**data.inputs).loss != loss
        assert fingerprint(model) != before
    assert fingerprint(model) == before
    assert find_handle(model) is None
    assert model(**data.inputs).loss == loss
    handle.remove()
    apply_pre(model).remove()
    assert fingerprint(model) == before


@every_family
def test_save_pretrained_is_unchanged(family: str, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    model = build(family)
    model.save_pretrained(tmp_path / "plain")
    apply_pre(model, [1, 2])
    model.save_pretrained(tmp_path / "attached")
    plain, attached = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "attached")
    )
    assert plain.keys() == attached.keys()
    assert all(torch.equal(tensor, attached[name]) for name, tensor in plain.items())
    loaded, info = type(model).from_pretrained(tmp_path / "attached", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    data = batch(family)
    assert loaded.eval()(**data.inputs).loss == model.eval()(**data.inputs).loss


def test_deepcopy_of_a_model_with_a_handle() -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    loss = model(**data.inputs).loss.detach()
    twin = copy.deepcopy(model)
    other = find_handle(twin)
    assert other is not None
    assert other is not handle
    assert other.head is twin.pre_head
    with torch.no_grad():
        twin.pre_head.w2.add_(1)
    assert model(**data.inputs).loss == loss
    changed = twin(**data.inputs).loss
    changed.backward()
    assert changed != loss
    assert model.pre_head.w1.grad is None
    assert twin.pre_head.w1.grad is not None
    other.remove()
    assert twin(**data.inputs).loss != loss
    assert model(**data.inputs).loss == loss
    assert find_handle(model) is handle


def test_each_head_is_made_where_its_layer_is() -> None:
    model = build("llava")
    model.model.language_model.layers[1].to("meta")
    handle = apply_pre(model, [2, 3])
    assert [h.w1.device.type for h in handle.head] == ["meta", "cpu"]
