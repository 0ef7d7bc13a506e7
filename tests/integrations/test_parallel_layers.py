"""Sequence and tensor parallelism on two processes, and device_map: loss and every gradient are
those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pre_kernels.integrations import apply_pre

from .support.by_hand import assert_same_gradients, gradients
from .support.processes import both
from .support.ranks import UNEVEN, batches, check, made, plainly
from .support.sequences import ring
from .support.split_layers import column_row
from .support.tiny.models import batch, build


def sequence_parallel(sample: Any, level: str) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    rank = torch.distributed.get_rank()
    data = batch("llava", [sample])
    mine = slice(rank * data.visual.shape[1] // 2, (rank + 1) * data.visual.shape[1] // 2)
    ALL_ATTENTION_FUNCTIONS.register("ring", ring)
    model = build("llava")
    text = model.model.language_model
    text.config._attn_implementation_internal = "ring"

    def split(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        places = torch.arange(data.visual.shape[1])[None]
        more = {"inputs_embeds": kwargs["inputs_embeds"][:, mine], "position_ids": places[:, mine]}
        return args, kwargs | more | {"attention_mask": None}

    # This comes before apply_pre, so that PRe sees only the half.
    text.register_forward_pre_hook(split, with_kwargs=True)
    apply_pre(model, group="world", level=level, mask_fn=lambda inputs: data.visual[:, mine])
    shifted = nn.functional.pad(data.inputs["labels"][:, 1:], (0, 1), value=-100)
    items = shifted.ne(-100).sum()
    loss = model(**data.inputs, shift_labels=shifted[:, mine], num_items_in_batch=items).loss
    loss.backward()
    grads = gradients(model)
    for name, parameter in model.named_parameters():
        total = torch.zeros_like(parameter) if grads[name] is None else grads[name]
        torch.distributed.all_reduce(total)
        grads[name] = None if grads[name] is None else total
    return loss.detach(), grads


HALVES = {
    "an image on each rank": [
        ("text", 2),
        ("image", 8, 8),
        ("text", 3),
        ("image", 8, 8),
        ("text", 6),
    ],
    "none on the second": [("text", 2), ("image", 8, 8), ("text", 13)],
    "one across the cut": [("text", 5), ("image", 8, 8), ("text", 2), ("image", 8, 8), ("text", 2)],
}


@pytest.mark.parametrize(
    ("sample", "level"),
    [*((name, "patch") for name in HALVES), ("an image on each rank", "image")],
)
def test_sequence_parallel(sample: str, level: str) -> None:
    """Each rank has half of a sequence. Summed over the ranks, loss and gradients are those of the
    whole sequence."""
    found = both(sequence_parallel, HALVES[sample], level)
    data = batch("llava", [HALVES[sample]])
    loss, wanted = plainly(data, level)
    torch.testing.assert_close(found[0][0] + found[1][0], loss)
    for _, gradient in found:
        assert_same_gradients(gradient, wanted)


def tensor_parallel(before: bool) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    model = build("llava")
    if before:
        apply_pre(model)
    for layer in model.model.language_model.layers:
        parallelize_module(layer, mesh, column_row())
    if not before:
        apply_pre(model)
    data = batches(UNEVEN, 0)[0]
    loss = model(**data.inputs).loss
    loss.backward()
    whole = {
        n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients(model).items()
    }
    return [loss.detach()], whole


@pytest.mark.parametrize("before", [True, False], ids=["attached before", "attached after"])
def test_tensor_parallel(before: bool) -> None:
    """Layers with split weights exchange full hidden states, so both ranks have the result of one
    process."""
    loss, wanted = plainly(batches(UNEVEN, 0)[0])
    check(both(tensor_parallel, before), ([loss], wanted))


def split_hidden() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    model, handle = made()
    text = model.model.language_model
    whole = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)},
        desired_input_kwarg_layouts={"hidden_states": Replicate()},
    )
    back = {
        n: RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        for n in ("self_attn.o_proj", "mlp.down_proj")
    }
    norms = {n: SequenceParallel() for n in ("input_layernorm", "post_attention_layernorm")}
    mlp = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    for layer in text.layers:
        parallelize_module(
            layer, mesh, column_row() | back | norms | {"self_attn": whole, "mlp": mlp}
        )
    first = PrepareModuleInput(
        input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False
    )
    parallelize_module(text, mesh, {"layers.0": first, "norm": SequenceParallel()})
    parallelize_module(
        model,
        mesh,
        {"lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())},
    )
    data = batch("llava", [[("text", 3), ("image", 8, 8), ("text", 4)]])
    with pytest.raises(
        TypeError,
        match=r"hidden: got a DTensor with placements \(Shard\(dim=1\),\), want plain tensors",
    ):
        model(**data.inputs)
    handle.enabled = False
    assert torch.isfinite(model(**data.inputs).loss)


def test_hidden_states_that_are_split() -> None:
    if torch.__version__.startswith("2.9."):
        pytest.skip("DTensors of torch 2.9 cannot be sliced as the model does")
    both(split_hidden)


def test_dispatched_model() -> None:
    """Uses accelerate's hooks of a device_map, which move the arguments of every module."""
    from accelerate import dispatch_model

    model = build("llava")
    text = model.model.language_model
    parts = [
        "vision_tower",
        "multi_modal_projector",
        *(f"language_model.{name}" for name, _ in text.named_children()),
    ]
    parts.remove("language_model.layers")
    parts += [f"language_model.layers.{number}" for number in range(len(text.layers))]
    devices = {"lm_head": "cpu"} | {f"model.{name}": "cpu" for name in parts}
    model = dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    assert hasattr(model.model.language_model.layers[1].mlp.up_proj, "_hf_hook")
    apply_pre(model)
    data = batches(UNEVEN, 0)[0]
    loss = model(**data.inputs).loss
    loss.backward()

    wanted, expected = plainly(data)
    torch.testing.assert_close(loss.detach(), wanted)
    assert_same_gradients(gradients(model), expected)


def test_offloaded_model() -> None:
    """Frozen weights are on "meta" between forwards. The head is made on the device where the layer
    computes, and trains."""
    from accelerate import cpu_offload

    model, plain = build("llava").requires_grad_(False), build("llava").requires_grad_(False)
    cpu_offload(model, torch.device("cpu"))
    assert model.model.language_model.layers[1].mlp.up_proj.weight.is_meta
    handle, own = apply_pre(model), apply_pre(plain)
    own.head.load_state_dict(handle.head.state_dict())
    data = batches(UNEVEN, 0)[0]
    for m in (model, plain):
        m(**data.inputs).loss.backward()
    # The frozen decoder has no gradient, but the head has one.
    for name, p in own.head.named_parameters():
        torch.testing.assert_close(handle.head.get_parameter(name).grad, p.grad)
