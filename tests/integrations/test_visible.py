"""Padding and dummy images in every form of mask: the visual tokens are the same as with the plain
mask (B, T)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from pre_kernels.integrations import apply_pre
from pre_kernels.integrations.notices import Notices
from pre_kernels.integrations.visible import visible

from .support.by_hand import assert_same_gradients, expected_gradients, gradients
from .support.tiny.models import FAMILIES, Batch, batch, build
from .support.waits import Waits
from .support.warned import pre_warnings

TOKENS = 20
WINDOW = 8  # the sliding window of the tiny Gemma 3
# name: (the one of two samples that has padding, its positions)
DUMMIES = {
    "right": (1, slice(11, TOKENS)),  # with both images
    "left": (0, slice(0, 6)),  # with the first image
    "inside": (0, slice(2, 6)),  # only the first image
    "last": (1, slice(TOKENS - 1, TOKENS)),  # one token
    "all": (1, slice(0, TOKENS)),
}
SAMPLES: list[Any] = [
    [("text", 1), ("image", 8, 8), ("text", 5), ("image", 8, 8), ("text", 5)],
    [("text", 10), ("image", 8, 8), ("image", 8, 8), ("text", 1)],
]


def padded(where: str) -> tuple[Batch, torch.Tensor]:
    """A batch for LLaVA without a mask, and its mask (B, T)."""
    data = batch("llava", SAMPLES)
    valid = torch.ones(data.visual.shape, dtype=torch.bool)
    valid[DUMMIES[where]] = False
    data.inputs["labels"] = data.inputs["labels"].where(valid, -100)
    del data.inputs["attention_mask"]
    return data, valid


def look(mask: Any, shape: tuple[int, int] = (2, TOKENS), **more: Any) -> Any:
    return visible({"attention_mask": mask, **more}, torch.Size(shape), Notices())


def square(valid: torch.Tensor, attends: torch.Tensor | None = None) -> torch.Tensor:
    """(B, 1, T, T): causal, except for padding."""
    tokens = valid.shape[1]
    attends = torch.ones(tokens, tokens, dtype=torch.bool).tril() if attends is None else attends
    return attends & valid[:, None, None, :]


def to_all(attends: torch.Tensor) -> torch.Tensor:
    """Queries without any key attend to all keys. transformers does this for kernels that would
    otherwise return nan."""
    return attends | ~attends.any(-1, keepdim=True)


def additive(low: float, dtype: torch.dtype = torch.float32) -> Any:
    return lambda attends: torch.zeros(attends.shape, dtype=dtype).masked_fill(~attends, low)


def of_heads(attends: torch.Tensor) -> torch.Tensor:
    """Each head attends to a part of the keys."""
    part = torch.arange(attends.shape[-1]) % 2 == 0
    return torch.cat([attends & part, attends & ~part], 1)


def sloped(attends: torch.Tensor) -> torch.Tensor:
    """With a bias for the distance, in addition to the padding."""
    place = torch.arange(attends.shape[-1])
    return (
        (place - place[:, None])
        .abs()
        .mul(-8.0)
        .masked_fill(~attends, torch.finfo(torch.float32).min)
    )


FORMS = {
    "bool": lambda a: a,
    "bool, to all": to_all,
    "bool, to itself": lambda a: a | torch.eye(a.shape[-1], dtype=torch.bool),
    "lowest": additive(torch.finfo(torch.float32).min),
    "lowest, to all": lambda a: additive(torch.finfo(torch.float32).min)(to_all(a)),
    "-10000": additive(-10000.0),
    "heads": of_heads,
    "bias": sloped,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["right", "left", "inside"])
def test_rows_and_gradients_under_a_square_mask(form: str, where: str) -> None:
    data, valid = padded(where)
    mask = FORMS[form](square(valid))
    # In float32, gradients through queries whose scores are all at the lowest number are noisy.
    data.inputs["attention_mask"] = mask if mask.dtype == torch.bool else mask.double()
    data.inputs["pixel_values"] = data.inputs["pixel_values"].double()
    model, plain = build("llava").double(), build("llava").double()
    handle = apply_pre(model)
    assert handle.count(data.inputs) == (data.visual & valid).sum() < data.visual.sum()
    loss = model(**data.inputs).loss
    loss.backward()
    data.visual = data.visual & valid
    wanted_loss, wanted = expected_gradients(plain, "llava", data, handle.head, [2])
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)
    assert handle.metrics()["pre_tokens"] == data.visual.sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", DUMMIES)
def test_padding_under_a_square_mask(form: str, where: str) -> None:
    _, valid = padded(where)
    mask = FORMS[form](square(valid))
    # Nothing distinguishes it from a sample that attends in both directions.
    if where == "all" and "to all" in form:
        valid[1] = True
    # Nothing distinguishes its last token from that of a whole sample.
    if where in ("right", "last") and "to itself" in form:
        valid[1, -1] = True
    assert torch.equal(look(mask), valid)


def test_minus_infinity_and_half_precision() -> None:
    _, valid = padded("right")
    for low, dtype in (
        (float("-inf"), torch.float32),
        (-65504.0, torch.float16),
        (float("-inf"), torch.bfloat16),
    ):
        assert torch.equal(look(additive(low, dtype)(square(valid))), valid)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_masks_that_models_make_of_the_plain_one(family: str, impl: str) -> None:
    """Causal masks, sliding windows, and masks in which images or a prefix attend in both
    directions."""
    model = build(family)
    try:
        model.set_attn_implementation(impl)
    except ValueError as error:
        pytest.skip(str(error))
    made: list[Any] = []
    for layer in model.get_submodule(FAMILIES[family].text).layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: made.append(kwargs["attention_mask"]), with_kwargs=True
        )
    for side in ("left", "right"):
        made.clear()
        data = batch(family, side=side)
        model(**data.inputs)
        wanted = data.inputs["attention_mask"].bool()
        masks = [mask for mask in made if mask is not None]
        assert any(mask.dim() == 4 for mask in masks)
        for mask in masks:
            assert torch.equal(look(mask, wanted.shape), wanted)


def test_masks_without_padding() -> None:
    every = torch.ones(1, 1, TOKENS, TOKENS).bool()
    causal = every.tril()
    block = causal.clone()
    # Two images that attend in both directions, one of them at the end.
    block[..., 6:11, 6:11] = block[..., -3:, -3:] = True
    prefix = causal.clone()
    prefix[..., :9, :9] = True
    window = causal & ~every.tril(-WINDOW)
    packed = causal.clone()
    packed[..., 8:, :8] = packed[..., 15:, :15] = False
    apart = causal.clone()
    apart[..., 6:11, 6:11] = True
    # The image attends only to itself, and the last query attends to all keys.
    apart[..., 6:11, :6] = False
    others = every & ~torch.eye(TOKENS).bool()
    masks = (
        every,
        causal,
        block,
        prefix,
        window,
        packed,
        apart,
        others,
        every[:, :, :1],
        causal.expand(2, 3, -1, -1),
    )
    for mask in masks:
        assert look(mask).all()
        assert look(additive(-1e9)(mask)).all()
    assert look(torch.ones(2, 1, 1, 1).bool(), (2, 1)).tolist() == [[True], [True]]
    assert look(torch.tensor([True, False]).view(2, 1, 1, 1), (2, 1)).tolist() == [[True], [False]]


def test_packed_sequences_in_a_square_mask() -> None:
    """Three sequences with padding after them: nothing attends to it, or it attends to all, or each
    of its tokens to itself."""
    sequence = torch.tensor([0] * 6 + [1] * 7 + [2] * 4 + [3] * 3)
    blocks = (sequence[:, None] == sequence) & torch.ones(TOKENS, TOKENS).bool().tril()
    real = sequence < 3
    keys = (blocks & real)[None, None]
    for mask in (keys, to_all(keys), keys | torch.eye(TOKENS).bool()):
        assert torch.equal(look(mask, (1, TOKENS))[0], real)
    alone = torch.tensor([0] * 6 + [1] + [2] * 13)  # a sequence of one token
    blocks = (alone[:, None] == alone) & torch.ones(TOKENS, TOKENS).bool().tril()
    assert torch.equal(look(blocks[None, None], (1, TOKENS))[0], alone != 1)


def test_keys_before_the_tokens() -> None:
    """The keys of a prefix or a cache, which are not tokens of the batch."""
    _, valid = padded("right")
    before = torch.ones(2, 3).bool()
    assert torch.equal(look(torch.cat([before, valid], 1).long()), valid)
    mask = torch.cat([before[:, None, None].expand(2, 1, TOKENS, 3), square(valid)], -1)
    assert torch.equal(look(mask), valid)
    assert torch.equal(look(valid[:, None, None]), valid)  # a mask of keys only


def check_gradients(family: str, data: Batch, valid: torch.Tensor) -> None:
    model, plain = build(family), build(family)
    for module in (model, plain):
        # With a cache, models do not look for packed sequences.
        module.config.get_text_config().use_cache = False
    handle = apply_pre(model)
    assert 0 < handle.count(data.inputs) == (data.visual & valid).sum() < data.visual.sum()
    data.visual = data.visual & valid
    loss = model(**data.inputs).loss
    loss.backward()
    wanted_loss, wanted = expected_gradients(plain, family, data, handle.head, [2])
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)
    assert handle.metrics()["pre_tokens"] == data.visual.sum()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_gradients_under_a_dict_of_masks(family: str) -> None:
    if family == "gemma3" and Version(transformers.__version__).major < 5:
        pytest.skip("its loss takes no dict yet")
    data = batch(family, [[("text", 2), ("image", 8, 8), ("text", 12)]] * 2)
    valid = torch.ones(data.visual.shape).bool()
    valid[1, :9] = False  # with the image
    tokens = valid.shape[1]
    causal = square(valid)
    data.inputs["attention_mask"] = {"full_attention": causal}
    if family == "gemma3":
        window = causal & ~torch.ones(tokens, tokens).bool().tril(-WINDOW)
        data.inputs["attention_mask"]["sliding_attention"] = window
    else:
        data.inputs["position_ids"] = torch.arange(tokens).expand(3, 2, tokens)
    check_gradients(family, data, valid)


def test_a_dict_of_masks_by_the_type_of_layer() -> None:
    _, valid = padded("left")
    causal = square(valid)
    none = torch.zeros_like(causal)
    for masks in ({"a": none, "b": causal}, {"a": causal, "b": None}, {"a": valid, "b": none}):
        assert torch.equal(look(masks, valid.shape), valid)
    assert look({"a": None, "b": None}) is None
    assert look({}) is None


PACKED = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0]  # two sequences, and padding


def packed(family: str) -> tuple[Batch, torch.Tensor]:
    """A row with two sequences, and an image as padding."""
    data = batch(
        family, [[("text", 2), ("image", 8, 8), ("text", 7), ("image", 8, 8), ("text", 1)]]
    )
    del data.inputs["attention_mask"]
    valid = torch.ones(data.visual.shape).bool()
    valid[0, 14:] = False
    data.inputs["labels"] = data.inputs["labels"].where(valid, -100)
    return data, valid


def test_padding_by_position_ids() -> None:
    data, valid = packed("llava")
    data.inputs["position_ids"] = torch.tensor([(PACKED + [0] * 9)[: valid.shape[1]]])
    assert torch.equal(look(None, valid.shape, position_ids=data.inputs["position_ids"]), valid)
    check_gradients("llava", data, valid)


def test_padding_by_the_position_ids_of_the_text_in_four_rows() -> None:
    data, valid = packed("qwen2_5_vl")
    tokens = valid.shape[1]
    text = torch.tensor([(PACKED + [0] * 9)[:tokens]])
    data.inputs["position_ids"] = torch.stack([text, *torch.randint(9, (3, 1, tokens))])
    check_gradients("qwen2_5_vl", data, valid)


def test_position_ids_that_tell_nothing() -> None:
    row = torch.tensor([PACKED] * 2)
    wanted = torch.tensor([[True] * 14 + [False] * 6] * 2)
    for ids in (row, row[:1], row.int(), torch.stack([row, 0 * row, 0 * row, 0 * row])):
        assert torch.equal(look(None, position_ids=ids), wanted)
    counted = torch.arange(TOKENS) + torch.tensor([[0], [7]])
    assert look(None, position_ids=counted).all()
    left = (wanted.flip(1).cumsum(1) - 1).where(wanted.flip(1), 1)  # like generate()
    assert torch.equal(look(None, position_ids=left), wanted.flip(1))
    for ids in (torch.stack([row] * 3), row.float(), row[:, :9], row[None], None, PACKED):
        assert look(None, position_ids=ids) is None
    # > only one token
    assert look(None, (2, 1), position_ids=torch.zeros(2, 1).long()) is None
    assert look(None, (6,), position_ids=torch.zeros(1, 6).long()) is None
    # transformers ignores these arguments too if there is a mask.
    assert look(torch.ones(2, TOKENS), position_ids=row).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_by_cumulative_lengths(dtype: torch.dtype) -> None:
    data, valid = packed("llava")
    ends = torch.tensor([0, 10, 14], dtype=dtype)
    more = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 10, "max_length_k": 10}
    data.inputs |= more | {"position_ids": torch.arange(valid.shape[1])[None]}
    check_gradients("llava", data, valid)

    def found(*lengths: int, shape: tuple[int, int] = (2, 5)) -> Any:
        return (
            look(None, shape, cu_seq_lens_q=torch.tensor([0, *lengths], dtype=dtype)).int().tolist()
        )

    assert found(5, 10) == [[1] * 5, [1] * 5]
    assert found(3, 8) == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert found(3, 4, 4, 8, 9, 10, 10) == [[1, 1, 1, 0, 1], [1, 1, 1, 0, 0]]
    assert found(0, shape=(1, 3)) == [[0, 0, 0]]
    assert look(None, (1, 1), cu_seq_lens_q=torch.tensor([0, 1])) is None


def test_masks_cost_no_host_sync() -> None:
    _, valid = padded("left")
    waits = Waits()
    causal = square(valid)
    arguments = [
        {"attention_mask": valid.long()},
        {"attention_mask": to_all(causal)},
        {"attention_mask": additive(-1e9)(of_heads(causal))},
        {"attention_mask": {"full_attention": causal, "sliding_attention": valid}},
        {"attention_mask": valid[:, None, None]},
        {"position_ids": torch.tensor([PACKED])},
        {"cu_seq_lens_q": torch.tensor([0, 9, 40])},
        {"attention_mask": causal[0]},
    ]
    with waits:
        for kwargs in arguments:
            visible(kwargs, valid.shape, Notices())
    assert waits.found == []


class BlockMask:
    """A stand-in for the mask of flex attention."""


@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (BlockMask(), "a BlockMask"),
        (torch.ones(2, TOKENS, TOKENS).bool(), r"torch.bool of shape \(2, 20, 20\)"),
        (torch.ones(2, 1, TOKENS, TOKENS).long(), r"torch.int64 of shape \(2, 1, 20, 20\)"),
        (torch.ones(3, 1, TOKENS, TOKENS).bool(), r"torch.bool of shape \(3, 1, 20, 20\)"),
        (torch.ones(2, 1, 7, TOKENS).bool(), r"torch.bool of shape \(2, 1, 7, 20\)"),
        (torch.ones(2, 9), r"torch.float32 of shape \(2, 9\)"),
        (torch.ones(1, TOKENS), r"torch.float32 of shape \(1, 20\)"),
    ],
    ids=["BlockMask", "3-D", "integers", "batch", "queries", "short", "one row"],
)
def test_a_mask_of_another_form_is_said_once(mask: Any, what: str) -> None:
    notices = Notices()
    with pytest.warns(
        UserWarning, match=rf"PRe: attention_mask is {what}, .* pass mask_fn= to apply_pre"
    ):
        assert visible({"attention_mask": mask}, torch.Size((2, TOKENS)), notices) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        visible({"attention_mask": mask}, torch.Size((2, TOKENS)), notices)
    _, valid = padded("right")
    masks = {"a": mask, "b": square(valid)}
    with pytest.warns(UserWarning, match=what):
        assert torch.equal(look(masks), valid)


def test_nothing_is_said_of_a_mask_that_is_known(recwarn: pytest.WarningsRecorder) -> None:
    data, valid = padded("left")
    model = build("llava")
    apply_pre(model)
    for mask in (None, valid, square(valid), to_all(square(valid))):
        model(**data.inputs, attention_mask=mask)
    assert pre_warnings(recwarn) == []
