"""A wrong argument or model raises an error with the argument, the value it got and the value it
needs."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pre_kernels.integrations import Reader, apply_pre, families

from .support.tiny.fuyu import fuyu
from .support.tiny.models import DEPTH, FAMILIES, IMAGE, batch, build, text_config

BAD = [
    ({"layer": 0}, ValueError, r"layer: got 0, want 1\.\.4"),
    ({"layer": DEPTH + 1}, ValueError, r"layer: got 5, want 1\.\.4"),
    ({"layer": [1, 9]}, ValueError, r"layer: got 9, want 1\.\.4"),
    ({"layer": []}, ValueError, "layer: got .*at least one"),
    ({"layer": [2, 2]}, ValueError, "layer: got .*none twice"),
    ({"layer": 1.5}, TypeError, "layer: got 1.5"),
    ({"layer": True}, TypeError, "layer: got True"),
    ({"layer": "2"}, TypeError, "layer: got '2'"),
    ({"layer": torch.tensor([1, 2])}, TypeError, "layer: got tensor"),
    ({"layer": [1, None]}, TypeError, "layer: got None"),
    ({"weight": -0.1}, ValueError, "weight: got -0.1"),
    ({"weight": float("nan")}, ValueError, "weight: got nan"),
    ({"weight": float("inf")}, ValueError, "weight: got inf"),
    ({"weight": "0.5"}, TypeError, "weight: got '0.5'"),
    ({"loss": "cos"}, ValueError, "loss: got 'cos'"),
    ({"activation": "tanh"}, ValueError, "activation: got 'tanh'"),
    ({"hidden_dim": 0}, ValueError, "hidden_dim: got 0"),
    (
        {"anchor": "post_llm"},
        ValueError,
        "anchor: got 'post_llm', want one of 'pre_llm', 'pre_projector'",
    ),
    ({"anchor": 3}, ValueError, "anchor: got 3"),
    ({"anchor_dim": 8}, ValueError, "anchor_dim: got 8 with anchor='pre_llm'"),
    ({"level": "token"}, ValueError, "level: got 'token', want one of 'patch', 'image'"),
    ({"weighting": "patch"}, ValueError, "weighting: got 'patch', want one of 'token', 'image'"),
    ({"fraction": 0}, ValueError, r"fraction: got 0, want a number in \(0, 1\]"),
    ({"fraction": 1.5}, ValueError, "fraction: got 1.5"),
    ({"fraction": float("nan")}, ValueError, "fraction: got nan"),
    ({"fraction": "half"}, TypeError, "fraction: got 'half'"),
    ({"fraction": True}, TypeError, "fraction: got True"),
    ({"anchor": print, "anchor_dim": 0}, ValueError, "anchor_dim: got 0"),
    ({"mask_fn": torch.ones(2)}, TypeError, "mask_fn: got Tensor"),
    ({"text_model": "model.vision_tower"}, ValueError, r"no decoder layers .*pass text_model="),
    ({"text_model": "model.nothing"}, ValueError, "text_model: .*model.nothing"),
    ({"impl": "cuda"}, ValueError, "impl: got 'cuda'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[str(a) for a, *_ in BAD])
def test_bad_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build("llava")
    with pytest.raises(error, match=message):
        apply_pre(model, **arguments)
    assert not hasattr(model, "pre_head")
    # The failed call must leave nothing behind, so that this one works.
    apply_pre(model)


def test_bad_weight_later() -> None:
    handle = apply_pre(build("llava"))
    with pytest.raises(ValueError, match=r"weight: got -1"):
        handle.weight = -1
    assert handle.weight == 0.5


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"model: got 'llava', want a loaded model"):
        apply_pre("llava")  # type: ignore[arg-type]


def test_model_without_config() -> None:
    with pytest.raises(ValueError, match=r"model: Linear has no .config"):
        apply_pre(nn.Linear(2, 2))


def test_model_inside_another_module() -> None:
    """As in a LightningModule."""
    around = nn.Module()
    around.net = build("llava")
    with pytest.raises(ValueError, match=r"no .config; want .* its part: apply_pre\(model.net\)"):
        apply_pre(around)
    apply_pre(around.net)


def test_model_without_visual_tokens(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=32,
    )
    with pytest.raises(
        ValueError,
        match=r"names no visual tokens .*InternVL's own chat code .*"
        r"set image_token_id .*in config.json",
    ):
        apply_pre(LlamaForCausalLM(config))
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(kept | {"image_token_id": 31}))
    apply_pre(LlamaForCausalLM.from_pretrained(tmp_path))


def mllama() -> nn.Module:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
    }
    vision |= {
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 1,
        "vision_output_dim": 32,
    }
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    config = transformers.MllamaConfig(
        vision_config=vision,
        text_config=text_config(
            rope_scaling={"rope_type": "default"}, cross_attention_layers=[1], pad_token_id=0
        ),
        image_token_index=IMAGE,
    )
    return transformers.MllamaForConditionalGeneration(config)


def test_images_that_enter_by_cross_attention() -> None:
    model = mllama()
    for attach in (apply_pre, Reader):
        with pytest.raises(
            ValueError,
            match=r"model: the images of Mllama.* cross_attention_layers \[1\].*pass mask_fn=",
        ):
            attach(model)
    assert not hasattr(model, "pre_head")
    apply_pre(model, mask_fn=lambda inputs: inputs["input_ids"] == IMAGE)


def test_image_tokens_without_an_image_in_an_unlisted_family(
    recwarn: pytest.WarningsRecorder,
) -> None:
    warnings.simplefilter("always")
    model = fuyu()
    handle = apply_pre(model)
    text = torch.tensor([[1, 5, 6, 7, 8]])
    model(input_ids=text, labels=text)
    assert not [w for w in recwarn if "PRe" in str(w.message)]
    ids = torch.tensor([[1, IMAGE, IMAGE, 5, 6]])
    patches = {
        "image_patches": torch.randn(1, 2, 48),
        "image_patches_indices": torch.tensor([[-1, 0, 1, -1, -1]]),
    }
    for _ in range(2):
        model(input_ids=ids, labels=text, **patches)
    (warning,) = [str(w.message) for w in recwarn if "PRe" in str(w.message)]
    assert re.search(
        "2 image tokens, .* none of pixel_values, image_embeds, .*image_patches.*pass mask_fn=",
        warning,
    )
    assert handle.metrics()["pre_rows"] == 0
    handle.remove()
    handle = apply_pre(model, mask_fn=lambda inputs: inputs["input_ids"] == IMAGE)
    model(input_ids=ids, labels=text, **patches)
    assert handle.metrics()["pre_rows"] == 2


def test_model_without_decoder_layers() -> None:
    model = build("llava")
    del model.model.language_model.layers
    with pytest.raises(
        ValueError,
        match=r"no decoder layers in Llava.*looked for .*`\.layers` of 4 modules in Llama",
    ):
        apply_pre(model)


def test_attached_twice() -> None:
    model = build("llava")
    handle = apply_pre(model)
    for part in (model, model.model, nn.ModuleList([model])):
        with pytest.raises(RuntimeError, match=r"has PRe attached already"):
            apply_pre(part)
    handle.remove()
    apply_pre(model)


def test_weights_loaded_after_attaching() -> None:
    """A strict load reports that the head is missing. Any other load loads the model and keeps the
    head."""
    plain, model = build("llava", seed=1), build("llava")
    handle = apply_pre(model)
    head = {name: p.clone() for name, p in handle.head.named_parameters()}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "pre_head.w1"'):
        model.load_state_dict(plain.state_dict())
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == [f"pre_head.{name}" for name in head]
    assert all(torch.equal(p, head[name]) for name, p in handle.head.named_parameters())
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_data_parallel() -> None:
    model = build("llava")
    with pytest.raises(TypeError, match=r"model: got nn.DataParallel"):
        apply_pre(nn.DataParallel(model))
    apply_pre(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"nn.DataParallel is not supported"):
        replica(**batch("llava").inputs)


@pytest.mark.parametrize("family", [f for f in FAMILIES if families.FAMILIES[f].projector is None])
def test_pre_projector_where_rows_do_not_correspond(family: str) -> None:
    with pytest.raises(
        ValueError,
        match=r'anchor: got "pre_projector", but no projector is known .*pass a callable',
    ):
        apply_pre(build(family), anchor="pre_projector")


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_before(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = build("llava")
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    for whole in (False, True):
        if whole:
            fully_shard(model, mesh=mesh)
        with pytest.raises(
            TypeError,
            match=r"with FSDPModule around or inside; want the plain model: call apply_pre",
        ):
            apply_pre(model)


def test_compiled_before() -> None:
    model = build("llava")
    with pytest.raises(
        TypeError, match=r"model: got OptimizedModule.*call apply_pre first, then torch.compile"
    ):
        apply_pre(torch.compile(model, backend="eager"))
    assert not hasattr(model, "pre_head")
    layers = model.model.language_model.layers
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer, backend="eager")
    apply_pre(model)  # compiled layers are fine


def test_dtensor_hidden(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    model = build("llava")
    handle = apply_pre(model)
    keep = handle._capture._keep
    handle._capture._keep = lambda n, h: keep(n, DTensor.from_local(h, mesh, [Replicate()]))
    with pytest.raises(TypeError, match=r"hidden: got a DTensor"):
        model(**batch("llava").inputs)


def test_pickle_keeps_the_handle(tmp_path: Any) -> None:
    model = build("llava")
    data = batch("llava")
    apply_pre(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert loaded(**data.inputs).loss == model(**data.inputs).loss
    copy.deepcopy(loaded)


def test_names_need_no_transformers_and_the_launcher_starts_without_torch() -> None:
    code = """if True:
        import sys
        import pre_kernels.integrations.launch
        assert "torch" not in sys.modules
        from pre_kernels.integrations import *
        assert apply_pre and "transformers" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
