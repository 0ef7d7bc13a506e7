"""The hooks' capture of a forward when another hook, a second call or an error comes between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pre_kernels.integrations import apply_pre

from .support.by_hand import assert_same_gradients, expected_gradients, gradients
from .support.tiny.models import DEPTH, IMAGE, batch, build


@pytest.mark.parametrize("first", [False, True])
def test_a_hook_that_puts_embeddings_in_the_place_of_input_ids(first: bool) -> None:
    """Like ms-swift's hook. `input_ids` are read before it, whichever hook was registered first."""

    def replace(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        ids, pixels = kwargs.pop("input_ids"), kwargs.pop("pixel_values")
        features = model.get_image_features(pixels)
        features = torch.cat(list(getattr(features, "pooler_output", features)))
        embeds = model.get_input_embeddings()(ids)
        return args, kwargs | {
            "inputs_embeds": embeds.masked_scatter((ids == IMAGE)[..., None], features)
        }

    model = build("llava")
    if first:
        model.register_forward_pre_hook(replace, with_kwargs=True)
    handle = apply_pre(model)
    if not first:
        model.register_forward_pre_hook(replace, with_kwargs=True)
    loss = model(**batch("llava").inputs).loss
    loss.backward()
    wanted_loss, wanted = expected_gradients(
        build("llava"), "llava", batch("llava"), handle.head, [DEPTH // 2]
    )
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)


def test_an_exception_in_the_forward_leaves_nothing() -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    norm = model.model.language_model.norm
    hook = norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError, match=r"stop"):
        model(**data.inputs)
    assert handle._capture.seen is None
    hook.remove()
    model(**data.inputs).loss.backward()
    assert handle.metrics()["pre_forwards"] == 1
    copy.deepcopy(model)


def test_what_an_interrupt_leaves_is_dropped() -> None:
    """After a KeyboardInterrupt no hook is called, so the next forward starts with the capture of
    this one."""
    model = build("llava")
    inputs = batch("llava").inputs
    plain = model.eval()(**inputs).loss
    apply_pre(model)
    hook = model.model.language_model.norm.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        model.train()(**inputs)
    hook.remove()
    assert model.eval()(**inputs).loss == plain


def test_the_first_call_of_a_layer_in_a_forward_counts() -> None:
    """A layer may run again before the forward ends, as in a recomputation."""
    plain = build("llava")
    apply_pre(plain)
    wanted = plain(**batch("llava").inputs).loss
    model = build("llava")
    layer = model.model.language_model.layers[2]
    again = [False]

    def twice(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        again[0] = not again[0]
        if again[0]:
            module(torch.zeros_like(args[0]), **kwargs)

    layer.register_forward_hook(twice, with_kwargs=True)
    apply_pre(model)
    assert model(**batch("llava").inputs, use_cache=False).loss == wanted


def test_a_module_that_a_compiler_put_in_the_models_place() -> None:
    """accelerate's regional compilation makes a module that has the hooks and a separate `training`
    flag."""
    from accelerate.utils import compile_regions

    model = build("llava").eval()
    handle = apply_pre(model)
    compiled = compile_regions(model, backend="eager").train()
    compiled(**batch("llava").inputs).loss.backward()
    assert not model.training
    assert handle.metrics()["pre_forwards"] == 1
    assert handle.head.w1.grad.any()
