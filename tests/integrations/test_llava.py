"""The original LLaVA code bases: visual rows are found although the merge does not record them, and
counted ahead."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pre_kernels import reference
from pre_kernels.integrations import apply_pre, patch_trainer

from .support.by_hand import assert_same_gradients, copy_of, gradients, means
from .support.original_llava import (
    SAMPLES,
    OldLlava,
    OldLlavaNext,
    TinyLlava,
    build_original,
    original_batch,
    parts,
)
from .support.tiny.training import InOrder, Recorder, Samples, arguments

CASES: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "crops": (OldLlava, {}, {}),
    "square": (OldLlava, {}, {"square": True}),
    "left": (OldLlava, {"tokenizer_padding_side": "left"}, {}),
    "truncated": (OldLlava, {"tokenizer_model_max_length": 13}, {}),
    "next": (OldLlavaNext, {}, {"modalities": ["image"] * 5, "image_sizes": [(8, 8)] * 5}),
    "video": (OldLlavaNext, {}, {"modalities": ["image", "video", "video"]}),
    "tiny": (TinyLlava, {}, {"square": True}),
    "tiny left": (TinyLlava, {"tokenizer_padding_side": "left"}, {"square": True}),
    "tiny truncated": (TinyLlava, {"tokenizer_model_max_length": 13}, {"square": True}),
    "tiny queries": (TinyLlava, {"queries": 3}, {"square": True}),
}


def by_hand(
    model: Any, inputs: dict[str, Any], head: Any, level: str = "patch", anchor: str = "pre_llm"
) -> Any:
    """(loss, gradients, truth (B, T)) of the plain model with PRe added by hand at layer 2."""
    seen: dict[str, Any] = {}
    body, projector, _ = parts(model)
    hooks = [
        body.register_forward_pre_hook(
            lambda m, a, k: seen.update(embeds=k["inputs_embeds"]), with_kwargs=True
        ),
        body.layers[2].register_forward_pre_hook(
            lambda m, a, k: seen.update(hidden=a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
        projector.register_forward_pre_hook(lambda m, a: seen.update(projector=a[0])),
    ]
    parameters = copy_of(head)
    output = model(**inputs)
    visual = model.truth > 0
    hidden, target = seen["hidden"][visual], seen["embeds"][visual]
    if anchor == "pre_projector":
        target = torch.cat(
            [seen["projector"][i - 1] for i in model.truth[visual].unique_consecutive().tolist()]
        )
    if level == "image":
        lengths = model.truth[visual].unique_consecutive(return_counts=True)[1].tolist()
        hidden, target = means(hidden, lengths), means(target, lengths)
    loss = output.loss + 0.5 * reference.pre_loss(hidden, target, **parameters)
    loss.backward()
    for hook in hooks:
        hook.remove()
    return (
        loss.detach(),
        gradients(model) | {f"pre_head.{n}": p.grad for n, p in parameters.items()},
        model.truth,
    )


def check(model: Any, inputs: dict[str, Any], **options: Any) -> None:
    twin = copy.deepcopy(model)
    handle = apply_pre(model, 2, **options)
    wanted, expected, truth = by_hand(twin, inputs, handle.head, **options)
    tower = parts(model)[2]
    merge = handle._objective.parts.merge
    assert merge.tokens == {
        (3, 8, 8): len(copy.deepcopy(model).encode_images(torch.zeros(1, 3, 8, 8))[0])
    }
    runs = tower.runs
    count = handle.count(inputs)
    assert tower.runs == runs
    visual = truth[truth > 0]
    assert int(count) == (len(visual) if options.get("level") != "image" else len(visual.unique()))
    loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), wanted)
    assert_same_gradients(gradients(model), expected)
    assert handle.metrics()["pre_rows"] == int(count)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", ["patch", "image"])
def test_loss_and_every_gradient(case: str, level: str) -> None:
    kind, config, more = CASES[case]
    check(build_original(kind, **config), original_batch(**more), level=level)


def test_anchor_before_the_projector() -> None:
    """The image of a text-only sample goes through the projector, but into no row."""
    samples: list[list[Any]] = [[3, "1", 5], [6], ["1", "1", 2]]
    for level in ("patch", "image"):
        check(build_original(), original_batch(samples), anchor="pre_projector", level=level)
        tiny = build_original(TinyLlava)
        check(tiny, original_batch(samples, square=True), anchor="pre_projector", level=level)
    model = build_original()
    apply_pre(model, anchor="pre_projector")
    with pytest.raises(
        ValueError, match=r"anchor: visual tokens that come from no row of the projector's input"
    ):
        model(**original_batch())
    mixed = build_original(TinyLlava, queries=3)  # 3 tokens from 4 rows of each image
    apply_pre(mixed, anchor="pre_projector")
    with pytest.raises(
        ValueError,
        match="anchor: 16 rows entered the projector, which made 12 visual tokens of them",
    ):
        mixed(**original_batch(samples, square=True))
    several = build_original(TinyLlava)  # features of two towers, as a tuple
    several.connector.forward = lambda both, forward=several.connector.forward: forward(both[0])
    several.encode_images = lambda images: several.connector((several.vision_tower(images),) * 2)
    apply_pre(several, anchor="pre_projector")
    with pytest.raises(TypeError, match="anchor: the projector got a tuple"):
        several(**original_batch(samples, square=True))


def test_a_model_without_what_the_merge_needs() -> None:
    """The error names the missing part. With a mask_fn nothing is missing."""

    class Encodes(TinyLlava):
        encode_images = None

    class Takes(TinyLlava):
        def prepare_inputs_labels_for_multimodal(self, input_ids, attention_mask, images):
            raise NotImplementedError

    class Gives(TinyLlava):
        def prepare_inputs_labels_for_multimodal(self, *args, **kwargs):
            raise NotImplementedError

    for kind, missing in (
        (Encodes, r"a method encode_images\(images\), without"),
        (Takes, "an argument labels of prepare_inputs_labels_for_multimodal, without"),
        (
            Gives,
            "an argument input_ids of .* and an argument labels of .* "
            "and an argument attention_mask of",
        ),
    ):
        with pytest.raises(
            ValueError, match=f"model: {kind.__name__} merges text and images in .*lacks {missing}"
        ):
            apply_pre(build_original(kind))
        apply_pre(build_original(kind), mask_fn=lambda inputs: inputs["input_ids"] < 0)

    class Short(TinyLlava):
        def prepare_inputs_labels_for_multimodal(self, input_ids, labels, attention_mask, images):
            return input_ids, labels

    model = build_original(Short)
    handle = apply_pre(model)
    with pytest.raises(
        RuntimeError, match=r"prepare_inputs_labels_for_multimodal: returned 2 values, want .* 6"
    ):
        handle.count(original_batch(square=True))


def test_without_an_attention_mask() -> None:
    inputs = original_batch([[3, "1", 5], [2, "3", 5]])
    check(build_original(), inputs | {"attention_mask": None})


@pytest.mark.parametrize("kind", [OldLlava, TinyLlava])
def test_text_only(kind: type) -> None:
    batch = original_batch([[4], [6]], square=kind is TinyLlava)
    for inputs in (batch, batch | {"images": None}):
        model = build_original(kind)
        handle = apply_pre(model)
        loss = model(**inputs).loss
        assert int(handle.count(inputs)) == 0
        handle.enabled = False
        torch.testing.assert_close(loss, model(**inputs).loss)
        loss.backward()
        assert not model.pre_head.w1.grad.any()


def test_labels_and_attention_reach_the_text_model_as_without() -> None:
    """The merge returns the same rows as without PRe, and is followed only in forwards that are
    captured."""
    model = build_original()
    seen: list[Any] = []
    original = model.prepare_inputs_labels_for_multimodal

    def recorded(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    inputs = original_batch()
    arguments = [
        inputs["input_ids"],
        None,
        inputs["attention_mask"],
        None,
        inputs["labels"],
        inputs["images"],
    ]
    plain = original(*arguments)
    handle = apply_pre(model)
    before = dict(vars(model))
    merge = handle._objective.parts.merge
    merge.open()
    merged = model.prepare_inputs_labels_for_multimodal(*arguments)
    merge.close()
    for mine, theirs in zip(merged, plain, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert dict(vars(model)) == before | {"truth": model.truth}

    # A forward that fails leaves nothing behind.
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        model(**inputs | {"images": [torch.zeros(1, 5, 8, 8)] * 5})
    assert "prepare_inputs_labels_for_multimodal" not in vars(model)
    # A patch that someone else made is kept, and called.
    vars(model)["prepare_inputs_labels_for_multimodal"] = recorded
    model(**inputs).loss.backward()
    assert len(seen) == 1
    assert vars(model)["prepare_inputs_labels_for_multimodal"] is recorded


@pytest.mark.parametrize("kind", [OldLlava, TinyLlava])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_trainer_counts_ahead(accumulation: int, kind: type, tmp_path: Path) -> None:
    """The step's gradient is that of the sum over its visual tokens. The vision tower does not run
    for the count."""
    model = build_original(kind)
    recorder = Recorder()
    square = kind is TinyLlava
    twin = copy.deepcopy(model)
    handle = apply_pre(model, 2)
    head = copy.deepcopy(handle.head)
    with patch_trainer():
        trainer = InOrder(
            model=model,
            args=arguments(tmp_path, accumulation, 4 // accumulation),
            train_dataset=Samples(SAMPLES),
            data_collator=lambda indices: original_batch(
                [SAMPLES[i] for i in indices], min(indices), square
            ),
            callbacks=[recorder],
        )
        trainer.train()
    assert parts(model)[2].runs == accumulation
    total = 0
    wanted = {n: torch.zeros_like(p) for n, p in head.named_parameters()}
    for i in range(0, 4, 4 // accumulation):
        inputs = original_batch(SAMPLES[i : i + 4 // accumulation], i, square)
        _, grads, truth = by_hand(twin, inputs, head)
        count = int((truth > 0).sum())
        total += count
        for name in wanted if count else ():
            wanted[name] += count * grads[f"pre_head.{name}"]
    for name in wanted:
        gradient = recorder.steps[0][f"pre_head.{name}"]
        torch.testing.assert_close(gradient, wanted[name] / total, rtol=2e-4, atol=1e-7)


def test_an_image_size_that_the_model_cannot_take() -> None:
    handle = apply_pre(build_original())
    with pytest.raises(
        RuntimeError, match=r"images: cannot tell how many tokens OldLlava makes of .* \(5, 8, 8\)"
    ):
        handle.count(original_batch() | {"images": [torch.zeros(1, 5, 8, 8)] * 5})


def test_nothing_to_find_the_images_in() -> None:
    model = build_original()
    apply_pre(model)
    with pytest.raises(ValueError, match="input_ids: the forward got none"):
        model(inputs_embeds=torch.zeros(1, 3, 32), labels=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("kind", [OldLlava, TinyLlava])
def test_lora(kind: type) -> None:
    """The merge is followed inside the PeftModel, and tokens are counted in the same way."""
    peft = pytest.importorskip("peft")
    model = build_original(kind)
    twin = copy.deepcopy(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    handle = apply_pre(wrapped, 2)
    inputs = original_batch(square=kind is TinyLlava)
    # At first LoRA does not change its base model.
    wanted, expected, truth = by_hand(twin, inputs, handle.head)
    assert int(handle.count(inputs)) == int((truth > 0).sum())
    loss = wrapped(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), wanted)
    for name, parameter in handle.head.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[f"pre_head.{name}"], rtol=1e-4, atol=2e-6
        )
