"""torch.compile and Liger's kernels with PRe: no additional graph, and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from pre_kernels.integrations import apply_pre

from .support.by_hand import assert_same_gradients, expected_gradients, gradients
from .support.tiny.models import batch, build


def frames(model: nn.Module, run: Any, inputs: dict[str, Any]) -> int:
    """The number of graphs of two steps. The second step compiles nothing."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    # The vision tower is not part of this test and takes the longest to compile.
    model.model.get_image_features = torch.compiler.disable(model.model.get_image_features)
    compiled = run(model, counter)
    counts = []
    for _ in range(2):
        model.zero_grad()
        compiled(**inputs).loss.backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    return counts[0]


def whole(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def by_layer(model: nn.Module, backend: Any) -> Any:
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend, fullgraph=True)
    return model


@pytest.mark.parametrize("run", [whole, by_layer])
def test_compilation_has_not_one_graph_more(run: Any) -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model, [2, 4])
    found = frames(model, run, data.inputs)
    _, wanted = expected_gradients(build("llava"), "llava", data, handle.head, [2, 4])
    assert_same_gradients(gradients(model), wanted)
    assert found == frames(build("llava"), run, data.inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels run in the interpreter here")
@pytest.mark.parametrize("order", ["before", "after"])
def test_liger_kernels(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only kernel of Liger that the interpreter runs. Liger replaces functions and forwards,
    but not hooks."""
    liger = pytest.importorskip("liger_kernel.transformers")
    if transformers.__version__.startswith("4."):
        pytest.skip("Liger needs transformers 5")
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    model = build("llava")
    data = batch("llava", [[("image", 8, 8), ("text", 2)]])
    switches = {
        "rms_norm": False,
        "swiglu": False,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    if order == "before":
        liger.apply_liger_kernel_to_llama(rope=True, **switches)
    handle = apply_pre(model)
    if order == "after":
        liger.apply_liger_kernel_to_llama(rope=True, **switches, model=model.model.language_model)
    loss = model(**data.inputs).loss
    loss.backward()
    assert "liger" in modeling_llama.apply_rotary_pos_emb.__module__
    monkeypatch.undo()
    wanted_loss, wanted = expected_gradients(build("llava"), "llava", data, handle.head, [2])
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)
