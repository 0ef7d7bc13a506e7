"""The paper's ablations as options of apply_pre: every pair of their values, and the guarantees of
each."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pre_kernels.checks import LOSSES
from pre_kernels.fused import steps_torch, steps_triton
from pre_kernels.integrations import apply_pre, objective, terms
from pre_kernels.integrations.image_rules import window_order
from pre_kernels.integrations.tokens import draw

from .support.by_hand import (
    assert_same_gradients,
    expected_gradients,
    gradients,
    projector_rows,
    watch,
)
from .support.pairs import pairs
from .support.tiny.models import DEPTH, FAMILIES, batch, build
from .support.waits import Waits

SIZES = [
    [("text", 2), ("image", 8, 16), ("text", 3), ("image", 8, 8), ("text", 4)],
    [("image", 16, 16), ("text", 5)],
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Keeps the masks that `draw` returns."""
    masks = []

    def keep(mask: torch.Tensor, fraction: float) -> Any:
        found = draw(mask, fraction)
        masks.append(found[0])
        return found

    monkeypatch.setattr(terms, "draw", keep)
    return masks


AXES = {
    "family": ["llava", "qwen2_5_vl"],
    "loss": list(LOSSES),
    "level": ["patch", "image"],
    "weighting": ["token", "image"],
    "fraction": [1.0, 0.4],
    "anchor": ["pre_llm", "pre_projector", "(N, z)", "(B, T, z)"],
    "layer": [None, DEPTH, [1, 3]],
    "checkpointing": [None, False, True],
    "impl": ["auto", "triton", "blas"],
}
CASES = pairs(AXES)


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, c.values())) for c in CASES])
def test_every_pair_of_options(case: dict[str, Any], drawn: list[torch.Tensor]) -> None:
    family, layer, level, fraction = (
        case[name] for name in ("family", "layer", "level", "fraction")
    )
    data = batch(family, SIZES)
    options = {name: case[name] for name in ("loss", "level", "weighting", "fraction", "impl")}
    target = None
    if case["anchor"] in ("pre_llm", "pre_projector"):
        options["anchor"] = case["anchor"]
        target = projector_rows(family, data) if case["anchor"] == "pre_projector" else None
    else:
        whole = torch.randn(*data.visual.shape, 7)
        target = whole[data.visual]
        returned = target if case["anchor"] == "(N, z)" else whole
        options |= {"anchor": lambda inputs, rows: returned, "anchor_dim": 7}

    model = build(family)
    if case["checkpointing"] is not None:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": case["checkpointing"]}
        )
    handle = apply_pre(model, layer, **options)
    loss = model(**data.inputs).loss
    loss.backward()

    count = len(data.lengths) if level == "image" else sum(data.lengths)
    chosen = None
    if fraction < 1:
        (mask,) = drawn
        chosen = mask if level == "image" else mask[data.visual]
        assert int(mask.sum()) == int(chosen.sum()) == round(fraction * count)
    layers = [DEPTH // 2] if layer is None else [layer] if isinstance(layer, int) else layer
    plain = {
        "loss": case["loss"],
        "level": level,
        "weighting": case["weighting"],
        "anchor": target,
        "chosen": chosen,
    }
    wanted_loss, wanted = expected_gradients(
        build(family), family, data, handle.head, layers, **plain
    )
    torch.testing.assert_close(loss.detach(), wanted_loss)
    assert_same_gradients(gradients(model), wanted)
    by_image = "image" in (level, case["weighting"])
    assert (
        handle.metrics()["pre_rows"]
        == handle.count(data.inputs)
        == (len(data.lengths) if by_image else count)
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pre_projector_rows_of_a_merger(family: str) -> None:
    """Images whose last windows are cut off at the border. The projector maps each anchor to the
    embedding of its token."""
    data = batch(
        family,
        [[("image", 12, 20), ("text", 2), ("image", 4, 12), ("text", 3)], [("image", 20, 8)]],
    )
    model = build(family)
    handle = apply_pre(model, anchor="pre_projector")
    anchors = []
    handle.head.register_forward_pre_hook(lambda module, args: anchors.append(args[1]))
    seen = watch(model, family)
    model(**data.inputs)
    assert anchors[0].shape == (sum(data.lengths), 4 * 24)
    projector = model.get_submodule(FAMILIES[family].projector)
    again = projector(anchors[0].reshape(-1, 24))
    torch.testing.assert_close(again, seen["embeds"][data.visual])


def test_window_order_of_videos() -> None:
    grid = torch.tensor([[2, 3, 5], [1, 4, 4], [3, 1, 7]])
    wanted = []
    offset = 0
    for frames, height, width in grid.tolist():
        for frame, top, left in itertools.product(
            range(frames), range(0, height, 2), range(0, width, 2)
        ):
            for y, x in itertools.product(
                range(top, min(top + 2, height)), range(left, min(left + 2, width))
            ):
                wanted.append(offset + (frame * height + y) * width + x)
        offset += frames * height * width
    assert window_order(grid, 2, offset).tolist() == wanted


def test_every_subset_is_drawn_alike() -> None:
    torch.manual_seed(3)
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()
    counts: dict[tuple[int, ...], int] = {}
    draws = 6000
    for _ in range(draws):
        chosen, drawn_fraction = draw(mask, 0.5)
        assert drawn_fraction == 0.5
        key = tuple(chosen.flatten().nonzero().flatten().tolist())
        counts[key] = counts.get(key, 0) + 1
    assert counts.keys() == set(itertools.combinations([0, 2, 3, 5], 2))
    sigma = (draws * (1 / 6) * (5 / 6)) ** 0.5
    assert all(abs(n - draws / 6) < 5 * sigma for n in counts.values())


@pytest.mark.parametrize(
    ("rows", "fraction", "size"),
    [(7, 0.3, 2), (7, 0.01, 1), (7, 0.99, 7), (1, 0.5, 1), (0, 0.5, 0)],
)
def test_draw_sizes(rows: int, fraction: float, size: int) -> None:
    mask = torch.arange(9) < rows
    chosen, drawn_fraction = draw(mask, fraction)
    assert int(chosen.sum()) == size
    assert not (chosen & ~mask).any()
    assert drawn_fraction == (size / rows if rows else 1)


@pytest.mark.parametrize(
    ("level", "weighting"), [("patch", "token"), ("patch", "image"), ("image", "token")]
)
def test_the_mean_over_all_draws_is_the_whole(
    level: str, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every subset that can be drawn is equally likely, and loss and every gradient are
    unbiased."""
    data = batch("qwen2_vl", [[("image", 4, 12), ("text", 3), ("image", 4, 8), ("text", 2)]])
    state = apply_pre(build("qwen2_vl")).head.state_dict()

    def step(**options: Any) -> Any:
        model = build("qwen2_vl")
        handle = apply_pre(model, level=level, weighting=weighting, **options)
        handle.head.load_state_dict(state)
        loss = model(**data.inputs).loss
        loss.backward()
        return {"loss": loss.detach()} | {
            k: v for k, v in gradients(model).items() if v is not None
        }

    count, size = (2, 1) if level == "image" else (5, 2)
    sums: dict[str, torch.Tensor] = {}
    subsets = list(itertools.combinations(range(count), size))
    for subset in subsets:

        def draw_subset(mask: torch.Tensor, fraction: float, subset: Any = subset) -> Any:
            chosen = torch.zeros_like(mask)
            chosen[tuple(mask.nonzero()[list(subset)].T)] = True
            return chosen, torch.tensor(fraction)

        monkeypatch.setattr(terms, "draw", draw_subset)
        for name, value in step(fraction=size / count).items():
            sums[name] = sums.get(name, 0) + value / len(subsets)
    assert_same_gradients(sums, step())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_draw_is_made_once_per_forward(reentrant: bool, drawn: list[torch.Tensor]) -> None:
    model = build("llava")
    data = batch("llava")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    apply_pre(model, [1, 3], fraction=0.5)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loss = model(**data.inputs).loss
        loss.backward()
        losses.append(loss.item())
    assert len(drawn) == 3
    assert losses[0] == losses[1] != losses[2]


def test_the_whole_draws_no_random_number() -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    before = torch.get_rng_state()
    model(**data.inputs)
    assert torch.equal(torch.get_rng_state(), before)
    handle._objective.fraction = 0.5
    model(**data.inputs)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("impl", "whole", "third"), [("torch", 12, 4), ("blas", 40, 14), ("triton", 12, 4)]
)
def test_the_head_computes_the_share_alone(
    impl: str, whole: int, third: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of rows in the matmuls: the selected rows, and for "blas" an upper bound of them
    (the 40 tokens of the batch if there is none)."""
    computed = []
    for steps in (steps_torch.TorchSteps, steps_triton.TritonSteps):
        select = steps.select

        def kept(problem: Any, select: Any = select) -> Any:
            selection = select(problem)
            computed.append(
                selection.capacity
                if impl == "blas" or selection.count is None
                else int(selection.count)
            )
            return selection

        monkeypatch.setattr(steps, "select", staticmethod(kept))
    for options in ({}, {"fraction": 1 / 3}, {"weight": 0, "fraction": 0.5}):
        model = build("llava")
        data = batch("llava")
        apply_pre(model, impl=impl, **options)
        model(**data.inputs)
    assert computed == [whole, third]


@pytest.mark.parametrize(
    ("impl", "dtype", "capacity"),
    [("auto", torch.float32, 21), ("auto", torch.float16, None), ("blas", torch.float16, 21)],
)
def test_a_bound_is_given_where_the_rows_there_are_would_not_be_counted(
    impl: str, dtype: torch.dtype, capacity: int | None
) -> None:
    """In half precision, "auto" computes only the selected rows if it is given no bound."""
    found = apply_pre(build("llava"), impl=impl, fraction=0.5)._objective
    state = torch.zeros(2, 20, 4, dtype=dtype)
    mask = torch.ones(2, 20, dtype=torch.bool)
    none: Any = SimpleNamespace(drawn_divisor=None, weight=None, gram_images=None)
    assert found._options(state, mask, none).get("capacity") == capacity
    # Indices are counted already.
    assert "capacity" not in found._options(state, mask.flatten().nonzero()[:, 0], none)
    found.fraction = 1.0
    assert "capacity" not in found._options(state, mask, none)


@pytest.mark.parametrize("divisor", [None, torch.tensor(5.0)], ids=["mean", "divisor"])
def test_a_fraction_costs_no_host_sync(divisor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits()
    original = objective.find_terms

    def watched(options: Any, seen: Any, visual: Any, hidden: Any, given: Any, over: Any) -> Any:
        with waits:
            return original(options, seen, visual, hidden, divisor, over)

    monkeypatch.setattr(objective, "find_terms", watched)
    model = build("llava")
    apply_pre(model, fraction=0.5)
    model(**batch("llava").inputs)
    assert waits.found == []
    with waits:  # the detector works
        bool(torch.ones(1))
    assert waits.found


@pytest.mark.parametrize(
    "options", [{"weighting": "image"}, {"fraction": 0.5}, {"weighting": "image", "fraction": 0.5}]
)
@pytest.mark.parametrize("level", ["patch", "image"])
@pytest.mark.parametrize("dummy", [False, True], ids=["text", "masked"])
def test_batches_without_terms(options: dict[str, Any], level: str, dummy: bool) -> None:
    data = batch("llava", [[("image", 8, 8), ("text", 4)]] if dummy else [[("text", 6)]])
    if dummy:
        data.inputs["attention_mask"][0, :5] = 0
    model = build("llava")
    handle = apply_pre(model, level=level, **options)
    loss = model(**data.inputs).loss
    loss.backward()
    assert loss == build("llava")(**data.inputs).loss
    assert handle.count(data.inputs) == handle.metrics()["pre_rows"] == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in handle.head.parameters())


def test_weighting_counts_tokens_that_are_not_masked() -> None:
    data = batch("llava", [[("image", 8, 8), ("text", 4)], [("image", 8, 8), ("text", 4)]])
    data.inputs["attention_mask"][1, :3] = 0  # leaves two of four tokens
    model = build("llava")
    handle = apply_pre(model, weighting="image")
    loss = model(**data.inputs).loss
    data.visual[1, :3] = False
    data.lengths = [4, 2]
    wanted, _ = expected_gradients(
        build("llava"), "llava", data, handle.head, [2], weighting="image"
    )
    torch.testing.assert_close(loss.detach(), wanted)
