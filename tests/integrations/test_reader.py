"""The reader returns the layers' output in every family, and leaves the model unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pre_kernels.diagnostics import LayerReport, Sample, contrast_ratio, mean_cosine, measure
from pre_kernels.integrations import Reader, apply_pre

from .support.by_hand import watch
from .support.tiny.models import DEPTH, FAMILIES, IMAGE, batch, build

MIXED = [
    [("text", 2), ("image", 8, 8), ("text", 3), ("image", 8, 8), ("text", 2)],
    [("text", 4), ("image", 8, 8), ("text", 6)],
]


def one_image(**more: object) -> Sample:
    data = batch("llava", [[("text", 2), ("image", 8, 8), ("text", 3)]])
    return Sample({k: v for k, v in data.inputs.items() if k != "labels"}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_what_the_layers_made(family: str) -> None:
    model = build(family)
    data = batch(family)
    inputs = {name: value for name, value in data.inputs.items() if name != "labels"}
    with Reader(model) as reader:
        images = reader.read(inputs)
    model.eval()
    seen = watch(model, family)
    with torch.no_grad():
        model(**inputs)
    assert reader.layers == tuple(range(DEPTH + 1))
    for number in reader.layers:
        states = torch.cat([image.hidden[number] for image in images])
        wanted = seen["embeds" if number == 0 else number][data.visual]
        torch.testing.assert_close(states, wanted)
    assert all(torch.equal(image.anchor, image.hidden[0]) for image in images)
    assert [len(image.anchor) for image in images] == data.lengths


def test_images_know_their_row_of_the_batch() -> None:
    data = batch("llava", MIXED)
    with Reader(build("llava"), layers=(2,)) as reader:
        images = reader.read(data.inputs)
    assert [image.sample for image in images] == [0, 0, 1]
    assert [[*image.hidden] for image in images] == [[2]] * 3


def test_the_model_is_left_as_it_was() -> None:
    model = build("llava")
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    # transformers adds its own hooks at the first use.
    model(**one_image().inputs)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with Reader(model) as reader:
        images = reader.read(one_image().inputs)
        assert not any(image.hidden[DEPTH].requires_grad for image in images)
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
        model(**one_image().inputs)
        # Other forwards keep no tensors alive.
        assert reader._seen is None
        with pytest.raises(RuntimeError, match="boom"):
            reader.read(
                one_image().inputs, call=lambda **_: (_ for _ in ()).throw(RuntimeError("boom"))
            )
        assert [module.training for module in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_beside_pre_and_through_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: object) -> object:
            return self.module(**inputs)

    model = build("llava")
    with Reader(model) as reader:
        alone = reader.read(one_image().inputs)
    handle = apply_pre(model)
    with Reader(model) as reader:
        beside = reader.read(one_image().inputs, call=Wrapper(model))
    assert handle.metrics()["pre_forwards"] == 0
    for number in reader.layers:
        assert torch.equal(alone[0].hidden[number], beside[0].hidden[number])


def test_peft() -> None:
    from peft import LoraConfig, get_peft_model

    model = build("llava")
    with Reader(model) as reader:
        wanted = reader.read(one_image().inputs)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))  # starts as the identity
    with Reader(wrapped) as reader:
        found = reader.read(one_image().inputs)
    torch.testing.assert_close(found[0].hidden[DEPTH], wanted[0].hidden[DEPTH])


# Chameleon forbids the tokens of images, and others scale or bound their logits, so only the order
# of the rest is compared.
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_of_the_last_layer_are_the_models(family: str) -> None:
    model = build(family)
    data = batch(family)
    with Reader(model) as reader:
        logits = reader.logits()
        assert (logits is None) == (family == "gemma3n")
        if logits is None:
            return
        images, output = reader.read_with_output(
            {k: v for k, v in data.inputs.items() if k != "labels"}
        )
        scores = logits(torch.cat([image.hidden[DEPTH] for image in images]))
    wanted = output.logits[data.visual]
    allowed = wanted[0] > torch.finfo(wanted.dtype).min
    assert torch.equal(scores[:, allowed].argsort(-1), wanted[:, allowed].argsort(-1))


def test_measure_feeds_the_report() -> None:
    model = build("llava")
    masks = torch.tensor([[True, True, False, False], [False, False, True, True]])
    sample = one_image(label=1, masks=masks, grid=(2, 2))
    with Reader(model, layers=(2, DEPTH)) as reader:
        (image,) = reader.read(sample.inputs)
        report = LayerReport(metrics=("structure", "cosine"))
        (states,) = measure(reader, [sample], report, lens=True)
    two, last = report.rows()
    assert (two["layer"], last["layer"]) == (2, DEPTH)
    for row in (two, last):
        hidden = image.hidden[row["layer"]]
        assert torch.equal(states[row["layer"]], hidden)
        assert row["contrast"] == pytest.approx(contrast_ratio(hidden, masks).ratio)
        assert row["cosine"] == pytest.approx(mean_cosine(hidden, image.anchor))
        assert row["near"] is not None
        assert row["lens_share"] == 1.0


def test_tiles_are_one_image_without_a_grid() -> None:
    model = build("idefics3")
    data = batch("idefics3", [[("text", 2), ("image", 8, 8), ("image", 8, 8), ("text", 3)]])
    report = LayerReport(metrics=("structure",))
    with Reader(model) as reader:
        list(measure(reader, [Sample(data.inputs, grid=(2, 2))], report))
    row = report.rows()[0]
    assert (row["images"], row["tokens"]) == (1, sum(data.lengths))
    assert row["near"] is None


def test_bad_input() -> None:
    model = build("llava")
    with pytest.raises(TypeError, match="model: got int"):
        Reader(3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=f"layers: got {DEPTH + 1} among them, want integers in 0..{DEPTH}"
    ):
        Reader(model, layers=(0, DEPTH + 1))
    with pytest.raises(TypeError, match="layers: got 'all'"):
        Reader(model, layers="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"1\.5 among them"):
        Reader(model, layers=[1.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="names no visual tokens"):
        Reader(text_only())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with Reader(model) as reader:
        with pytest.raises(ValueError, match="inputs: got no visual tokens"):
            reader.read({"input_ids": torch.tensor([[1, 5, 6]])})
        # A literal token is not an image.
        with pytest.raises(ValueError, match="inputs: got no visual tokens"):
            reader.read({"input_ids": torch.tensor([[1, IMAGE, 6]])})
        with pytest.raises(
            RuntimeError, match="call: it never called the LlavaForConditionalGeneration"
        ):
            reader.read(one_image().inputs, call=lambda **_: None)


def text_only() -> nn.Module:
    import transformers as hf

    config = hf.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=16,
    )
    return hf.LlamaForCausalLM(config)
