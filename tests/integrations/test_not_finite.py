"""Rows of hidden states or anchors that are not finite: the loss is not finite either, or it leaves
them out on request."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pre_kernels.integrations import (
    apply_pre,
    attach,
    metrics,
    objective,
    patch_trainer,
    terms,
)

from .support.by_hand import assert_same_gradients, expected_gradients, gradients
from .support.tiny.models import FAMILIES, Batch, batch, build
from .support.tiny.training import make
from .support.waits import Waits

NAN, INF = float("nan"), float("inf")


def bad_places(data: Batch, *tokens: int) -> Tensor:
    """A mask (B, T) of these visual tokens and of the last token of the batch, which is not
    visual."""
    places = data.visual.nonzero()[list(tokens)]
    bad = torch.zeros_like(data.visual)
    bad[places[:, 0], places[:, 1]] = True
    bad[-1, -1] = True
    return bad


def without(data: Batch, bad: Tensor) -> Batch:
    """The batch for the equation, with these visual tokens left out."""
    kept = (data.visual & ~bad)[data.visual]
    lengths = [int(part.sum()) for part in kept.split(data.lengths)]
    return Batch(data.inputs, data.visual & ~bad, [n for n in lengths if n])


def attach_poisoned(
    family: str, bad: dict[Any, Tensor], value: float, **options: Any
) -> tuple[nn.Module, Any]:
    """PRe sees `value` at `bad[l]` after l layers and at `bad["embeds"]`. The model computes with
    the true values."""
    model = build(family)
    text = model.get_submodule(FAMILIES[family].text)
    modules = [(text if at == "embeds" else text.layers[at], places) for at, places in bad.items()]
    true: dict[nn.Module, Any] = {}

    def poison(module: nn.Module, args: Any, kwargs: dict[str, Any], places: Tensor) -> Any:
        true[module] = args, kwargs
        name = "inputs_embeds" if module is text else "hidden_states"
        states = kwargs[name] if name in kwargs else args[0]
        shown = torch.where(places[..., None], value, states)
        return (args, kwargs | {name: shown}) if name in kwargs else ((shown, *args[1:]), kwargs)

    for module, places in modules:
        hook: Any = lambda m, a, k, places=places: poison(m, a, k, places)  # noqa: E731
        module.register_forward_pre_hook(hook, with_kwargs=True)
    handle = apply_pre(model, **options)
    for module, _ in modules:
        module.register_forward_pre_hook(lambda m, a, k: true.pop(m), with_kwargs=True)
    return model, handle


SKIPS: list[tuple[str, float, dict[str, Any]]] = [
    ("llava", NAN, {}),
    ("qwen2_5_vl", -INF, {}),
    ("qwen2_5_vl", NAN, {"loss": "mse"}),
    ("llava", NAN, {"layer": [1, 2], "impl": "triton"}),
    ("llava", INF, {"impl": "blas"}),
    ("llava", INF, {"level": "image"}),
    ("llava", NAN, {"weighting": "image"}),
]


@pytest.mark.parametrize(("family", "value", "options"), SKIPS, ids=str)
def test_skip_is_the_batch_without_these_rows(
    family: str, value: float, options: dict[str, Any]
) -> None:
    """Loss and every gradient. One image of llava loses all its tokens."""
    data = batch(family)
    hidden, embeds = bad_places(data, 1, 4, 5), bad_places(data, 5, 6, 7)
    layer = options.get("layer", 2)
    model, handle = attach_poisoned(
        family, {2: hidden, "embeds": embeds}, value, nonfinite="skip", **options | {"layer": layer}
    )
    loss = model(**data.inputs).loss
    loss.backward()
    more = {name: option for name, option in options.items() if name not in ("layer", "impl")}
    layers = [layer] if isinstance(layer, int) else layer
    rest = without(data, hidden | embeds)
    wanted_loss, wanted = expected_gradients(
        build(family), family, rest, handle.head, layers, **more
    )
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)

    reported = handle.metrics()
    total, kept = int(data.visual.sum()), int(rest.visual.sum())
    assert (
        (reported["pre_tokens"], reported["pre_skipped"]) == (kept, total - kept) == (total - 5, 5)
    )
    assert reported["pre_rows"] == (len(rest.lengths) if "image" in options.values() else kept)
    plain = build(family)(**data.inputs).loss.detach()
    assert reported["pre_loss"] == pytest.approx(float((wanted_loss - plain) / 0.5), abs=1e-5)
    assert math.isfinite(reported["pre_cosine"])
    assert handle.metrics()["pre_skipped"] == 0


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", [2, "embeds"])
def test_unless_asked_the_loss_says_so(where: Any, value: float) -> None:
    data = batch("llava")
    model, handle = attach_poisoned("llava", {where: bad_places(data, 3)}, value)
    loss = model(**data.inputs).loss
    loss.backward()
    assert not loss.isfinite()
    assert not handle.head.w1.grad.isfinite().all()
    reported = handle.metrics()
    assert not math.isfinite(reported["pre_loss"])
    assert "pre_skipped" not in reported
    # > only a token of text is bad
    model, handle = attach_poisoned("llava", {where: bad_places(data)}, value)
    assert model(**data.inputs).loss.isfinite()
    assert math.isfinite(handle.metrics()["pre_loss"])


def bad_anchor(count: int) -> Callable[..., Tensor]:
    """(N, z) with nan in the last `count` rows."""

    def anchor(inputs: dict[str, Any], rows: Tensor) -> Tensor:
        found = torch.randn(int(rows.sum()), 7, generator=torch.Generator().manual_seed(0))
        found[len(found) - count :, 3] = NAN
        return found

    return anchor


@pytest.mark.parametrize("debug", ["0", "1"])
def test_skip_in_the_anchors_of_a_callable(debug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRE_KERNELS_DEBUG", debug)
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model, anchor=bad_anchor(2), anchor_dim=7, nonfinite="skip")
    loss = model(**data.inputs).loss
    loss.backward()
    rest = without(data, bad_places(data, -1, -2))
    anchor = bad_anchor(2)({}, data.visual)[:-2]
    wanted_loss, wanted = expected_gradients(
        build("llava"), "llava", rest, handle.head, [2], anchor=anchor
    )
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)


def test_a_count_made_ahead_keeps_skipped_rows_as_terms_of_0() -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model, anchor=bad_anchor(4), anchor_dim=7, nonfinite="skip")
    mean = float(model(**data.inputs).loss.detach() - build("llava")(**data.inputs).loss.detach())
    with handle.defer(12.0) as deferred:
        model(**data.inputs)
    assert handle.count(data.inputs) == deferred.seen == 12
    assert float(deferred.take().detach()) == pytest.approx(mean * 8 / 12, abs=1e-6)


@pytest.mark.parametrize(
    "more", [{}, {"loss": "mse"}, {"level": "image"}, {"weighting": "image"}, {"fraction": 0.5}]
)
def test_nothing_left_but_what_is_skipped(more: dict[str, Any]) -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model, anchor=bad_anchor(12), anchor_dim=7, nonfinite="skip", **more)
    loss = model(**data.inputs).loss
    loss.backward()
    assert loss == build("llava")(**data.inputs).loss
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in handle.head.parameters())
    found = handle.metrics()
    assert (found["pre_rows"], found["pre_skipped"]) == (0, 12)
    assert math.isnan(found["pre_loss"])


def test_skipping_waits_for_nothing_and_costs_nothing_unless_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = Waits()
    calls = []
    find_terms = objective.find_terms
    drop_nonfinite = terms.drop_nonfinite

    def watched(*args: Any) -> Any:
        with waits:
            return find_terms(*args)

    monkeypatch.setattr(objective, "find_terms", watched)
    monkeypatch.setattr(
        terms, "drop_nonfinite", lambda *args: calls.append(1) or drop_nonfinite(*args)
    )
    for nonfinite in attach.NONFINITE:
        model = build("llava")
        apply_pre(model, nonfinite=nonfinite)
        model(**batch("llava").inputs)
        assert waits.found == []
        assert len(calls) == (nonfinite == "skip")


def test_a_training_logs_what_it_skipped(tmp_path: Path) -> None:
    """All tokens are skipped, and the loss is still finite."""
    model = build("llava")
    apply_pre(model, anchor=bad_anchor(8), anchor_dim=7, nonfinite="skip")
    with patch_trainer():
        trainer = make(tmp_path, model)
        trainer.train()
    log = trainer.state.log_history[0]
    assert (log["pre_skipped"], log["pre_tokens"]) == (16, 0)
    assert math.isfinite(log["loss"])


def test_the_sampled_cosine_counts_no_row_that_stands_in() -> None:
    """There are fewer rows than the size of the sample, and the row that is read instead has
    nan."""
    handle = apply_pre(build("llava"), loss="mse")
    hidden = torch.ones(6, 32)
    mask = torch.tensor([True, True, False, False, False, False])
    hidden[2:] = NAN
    assert (
        metrics.sample_cosine(handle.head, hidden, torch.ones(6, 32), mask, "torch")
        .isfinite()
        .all()
    )
