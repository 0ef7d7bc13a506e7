"""patch_trainer on a class that is patched already, and on something that is not a class of a
Trainer; apply_pre on something that is not a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import LlavaForConditionalGeneration, Trainer

from pre_kernels.integrations import apply_pre, find_handle, patch_trainer

from .support.tiny.models import build
from .support.tiny.training import InOrder, arguments


@pytest.fixture
def patched() -> Iterator[Callable[[], bool]]:
    """Whether transformers.Trainer is patched."""
    before = dict(vars(Trainer))
    yield lambda: dict(vars(Trainer)) != before
    assert dict(vars(Trainer)) == before


def test_a_second_call_returns_the_same_patch(patched: Callable[[], bool]) -> None:
    """As when a notebook's cell runs twice."""
    patch = patch_trainer()
    assert patch_trainer() is patch
    assert patch_trainer(Trainer) is patch
    assert patch_trainer(InOrder) is patch  # the patch of a base is that of the class
    patch.remove()
    assert not patched()


def test_a_block_leaves_the_patch_that_it_found(patched: Callable[[], bool]) -> None:
    patch = patch_trainer()
    with patch_trainer() as again:
        assert again is patch
    assert patched()
    patch.remove()


def test_blocks_inside_each_other(patched: Callable[[], bool]) -> None:
    with patch_trainer():
        with patch_trainer(InOrder):
            assert patched()
        assert patched()
    assert not patched()


def test_a_patch_that_is_kept_and_used_as_a_block(patched: Callable[[], bool]) -> None:
    patch = patch_trainer()
    with patch:
        assert patched()
    assert not patched()
    assert patch_trainer() is not patch
    patch_trainer().remove()


def test_a_base_of_a_patched_class(patched: Callable[[], bool]) -> None:
    with patch_trainer(InOrder) as own, patch_trainer() as of_all:
        assert own is not of_all
        assert patched()
    assert not patched()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda _: int, "the class int, want transformers.Trainer or a subclass; write patch_tr"),
        (lambda _: "Trainer", "'Trainer', want transformers.Trainer or a subclass; write patch_"),
        (
            lambda _: build("llava"),
            "a LlavaForConditionalGeneration, want transformers.Trainer or a subclass; write "
            "apply_pre(model) and then patch_trainer(), which patches all Trainers",
        ),
        (
            lambda path: InOrder(model=build("llava"), args=arguments(path, 1, 1)),
            "a InOrder, want transformers.Trainer or a subclass; write patch_trainer(InOrder)",
        ),
    ],
    ids=["a class", "a text", "a model", "a trainer"],
)
def test_patch_of_something_else(
    given: Callable[[Any], Any], message: str, tmp_path: Any, patched: Callable[[], bool]
) -> None:
    with pytest.raises(TypeError) as raised:
        patch_trainer(given(tmp_path))
    assert str(raised.value).startswith(f"trainer_class: got {message}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "None, want a loaded model"),
        ({}, "a dict, want a loaded model"),
        (
            "llava-hf/llava-1.5-7b-hf",
            "'llava-hf/llava-1.5-7b-hf', want a loaded model; write apply_pre("
            "AutoModelForImageTextToText.from_pretrained('llava-hf/llava-1.5-7b-hf'))",
        ),
        (
            LlavaForConditionalGeneration,
            "the class LlavaForConditionalGeneration, want a loaded model; write "
            "apply_pre(LlavaForConditionalGeneration.from_pretrained(...))",
        ),
        (
            SimpleNamespace(model=nn.Linear(2, 2)),
            "a SimpleNamespace, want a loaded model; write apply_pre(x.model), where x is that "
            "SimpleNamespace",
        ),
        (
            nn.DataParallel(nn.Linear(2, 2)),
            "nn.DataParallel, whose replicas share hooks; want the module inside, "
            "apply_pre(model.module), under DDP or FSDP",
        ),
    ],
    ids=["None", "dict", "name", "class", "trainer", "DataParallel"],
)
def test_attaching_to_something_else(model: Any, message: str) -> None:
    with pytest.raises(TypeError) as raised:
        apply_pre(model)
    assert str(raised.value) == f"model: got {message}"


def test_attaching_twice_says_how_to_take_the_first_off() -> None:
    model = build("llava")
    apply_pre(model)
    with pytest.raises(RuntimeError, match=r"attached already; .*find_handle\(model\).remove\(\)"):
        apply_pre(model)
    found = find_handle(model)
    assert found is not None
    found.remove()
    apply_pre(model)


def test_a_model_with_a_pre_head_of_its_own() -> None:
    model = build("llava")
    model.pre_head = nn.Linear(2, 2)
    with pytest.raises(
        RuntimeError, match=r"`pre_head` of its own, want that name free .*; rename"
    ):
        apply_pre(model)
