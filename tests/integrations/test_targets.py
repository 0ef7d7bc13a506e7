"""apply_pre(targets=): several pairs of a layer and an anchor, which share the selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pre_kernels.integrations import apply_pre, objective, terms
from pre_kernels.integrations.tokens import draw

from .support.by_hand import (
    assert_same_gradients,
    copy_of,
    gradients,
    pre_loss,
    projector_rows,
    watch,
)
from .support.tiny.models import batch, build

SIZES = [
    [("text", 2), ("image", 8, 8), ("text", 3), ("image", 8, 8), ("text", 4)],
    [("image", 8, 8), ("text", 5)],
]


class Features:
    """Anchors (N, z) or (B, T, z) of a width of their own, which count their calls."""

    anchor_dim = 7

    def __init__(self, flat: bool) -> None:
        torch.manual_seed(8)
        self.whole = torch.randn(2, 40, 7)
        self.flat = flat
        self.calls = 0

    def __call__(self, inputs: Any, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        whole = self.whole[:, : rows.shape[1]]
        return whole[rows] if self.flat else whole


@pytest.mark.parametrize("flat", [False, True], ids=["(B, T, z)", "(N, z)"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "mse"},
        {"level": "image"},
        {"weighting": "image"},
        {"fraction": 0.4},
        {"fraction": 0.5, "level": "image"},
        {"nonfinite": "skip"},
        {"impl": "triton"},
        {"impl": "blas", "fraction": 0.4},
    ],
    ids=str,
)
def test_the_equation(options: dict[str, Any], flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def keep(mask: torch.Tensor, fraction: float) -> Any:
        drawn.append(draw(mask, fraction))
        return drawn[-1]

    monkeypatch.setattr(terms, "draw", keep)
    data = batch("llava", SIZES)
    features = Features(flat)
    targets = [(1, "pre_llm"), (3, features), (3, "pre_projector"), (4, features)]
    model = build("llava")
    handle = apply_pre(model, targets=targets, **options)
    assert [head.out_dim for head in handle.head] == [32, 7, 24, 7]
    loss = model(**data.inputs).loss
    loss.backward()
    assert features.calls == 1
    assert len(drawn) == ("fraction" in options)

    chosen = None
    if drawn:
        (mask, _), by_image = drawn[0], options.get("level") == "image"
        chosen = mask if by_image else mask[data.visual]
    plain = build("llava")
    seen = watch(plain, "llava")
    head = copy_of(handle.head)
    output = plain(**data.inputs)
    losses = []
    for number, (layer, anchor) in enumerate(targets):
        target = None
        if anchor is features:
            target = features.whole[:, : data.visual.shape[1]][data.visual]
        elif anchor == "pre_projector":
            target = projector_rows("llava", data)
        own = {n.split(".")[1]: p for n, p in head.items() if n.startswith(f"{number}.")}
        by_hand = {n: v for n, v in options.items() if n in ("loss", "level", "weighting")}
        losses.append(pre_loss(seen, data, [layer], own, anchor=target, chosen=chosen, **by_hand))
    wanted = output.loss + 0.5 * torch.stack(losses).mean()
    wanted.backward()
    torch.testing.assert_close(loss.detach(), wanted.detach())
    of_head = {f"pre_head.{name}": p.grad for name, p in head.items()}
    assert_same_gradients(gradients(model), gradients(plain) | of_head)

    metrics = handle.metrics()
    names = ("1", "3_1", "3_2", "4")
    for name, value in zip(names, losses, strict=True):
        if not drawn:
            assert metrics[f"pre_loss/layer_{name}"] == pytest.approx(value.item(), abs=1e-5)
    assert len([name for name in metrics if name.startswith("pre_loss/")]) == 4


@pytest.mark.parametrize("flat", [False, True])
def test_the_rows_are_found_once_where_the_host_knows_their_number(flat: bool) -> None:
    model = build("llava")
    handle = apply_pre(model, targets=[(1, "pre_llm"), (3, Features(flat))])
    rows = []
    for head in handle.head:
        head.register_forward_pre_hook(lambda module, args: rows.append(args[2]))
    data = batch("llava", SIZES)
    model(**data.inputs)
    assert rows[0] is rows[1]
    if flat:
        assert rows[0].tolist() == data.visual.flatten().nonzero().flatten().tolist()
    else:
        assert torch.equal(rows[0], data.visual)


def test_the_tokens_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    find_tokens = objective.find_tokens
    monkeypatch.setattr(
        objective, "find_tokens", lambda *args: calls.append(1) or find_tokens(*args)
    )
    model = build("llava")
    apply_pre(model, targets=[(1, "pre_llm"), (3, "pre_llm")])
    model(**batch("llava").inputs)
    assert calls == [1]


@pytest.mark.parametrize("text", [False, True])
def test_a_sequence_of_layers_is_the_same(text: bool, tmp_path: Path) -> None:
    data = batch("llava", [[("text", 6)]] if text else SIZES)
    found = []
    for arguments in ({"layer": [1, 3]}, {"targets": [(1, "pre_llm"), (3, "pre_llm")]}):
        model = build("llava")
        torch.manual_seed(2)
        handle = apply_pre(model, **arguments)
        model(**data.inputs).loss.backward()
        found.append((gradients(model), handle.settings(), handle.metrics(), str(handle)))
        handle.save(tmp_path / str(len(found)))
    assert_same_gradients(found[0][0], found[1][0], 0, 0)
    assert found[0][1] == found[1][1]
    assert str(found[0][2]) == str(found[1][2])
    assert found[0][3] == found[1][3]
    handle.load(tmp_path / "1")


def test_it_is_saved_loaded_and_described(tmp_path: Path) -> None:
    targets = [(2, "pre_llm"), (2, Features(True))]
    with apply_pre(build("llava"), targets=targets) as handle:
        assert "\n  layers 2, 2 of 4, " in str(handle)
        assert "anchor pre_llm, Features, level patch" in str(handle)
        handle.save(tmp_path)
        saved = handle.head.state_dict()
    with apply_pre(build("llava"), targets=targets) as handle:
        handle.load(tmp_path)
        assert all(torch.equal(saved[n], t) for n, t in handle.head.state_dict().items())
    with (
        apply_pre(build("llava"), targets=[(2, "pre_llm"), (2, "pre_projector")]) as handle,
        pytest.raises(ValueError, match="says 'pre_llm, callable', this handle has 'pre_llm, pre_"),
    ):
        handle.load(tmp_path)


class Wide(Features):
    anchor_dim = 9


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "targets: got .*, want at least one pair"),
        ([2, 3], r"targets: got 2, want pairs \(layer, anchor\)"),
        ("pre_llm", "targets: got 'pre_llm', want pairs"),
        ([(1, "pre_llm", 8)], "targets: got .*, want pairs"),
        ([(1, "pre_llm"), [1, "pre_llm"]], "targets: got .*, want at least one pair, and none"),
        ([(9, "pre_llm")], r"layer: got 9, want 1\.\.4"),
        ([(None, "pre_llm")], "layer: got None"),
        ([(1, "post_llm")], "anchor: got 'post_llm', want one of"),
    ],
)
def test_wrong_pairs(targets: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        apply_pre(build("llava"), targets=targets)


@pytest.mark.parametrize(
    "more", [{"layer": 2}, {"anchor": "pre_projector"}, {"anchor_dim": 7}], ids=str
)
def test_not_beside_what_the_pairs_say(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="targets: got layer, anchor or anchor_dim too"):
        apply_pre(build("llava"), targets=[(1, "pre_llm")], **more)


def test_an_anchor_of_another_width() -> None:
    model = build("llava")
    apply_pre(model, targets=[(1, "pre_llm"), (3, Wide(True))])
    with pytest.raises(ValueError, match=r"anchor: got shape .*want width 9"):
        model(**batch("llava", SIZES).inputs)
