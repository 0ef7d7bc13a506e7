"""The shapes that are measured, and the plan of a device."""

import dataclasses

import pytest
import torch

from bench import baselines, cpu_goals, shapes, suite
from pre_kernels.check.device import current

from .support import TINY


def test_the_plan_of_a_cpu():
    plan = [(shape.name, dtype, rows) for shape, dtype, rows in shapes.plan(torch.device("cpu"))]
    assert len(set(plan)) == len(plan)
    assert {name for name, _, _ in plan} == {
        shape.name for shape in [*shapes.CPU, *shapes.HEADS["cpu"]]
    }
    large = [one for one in plan if one[0] != cpu_goals.SMALL]
    assert plan[: baselines.COSTLY] == [("cpu-16k", "bf16", "index"), ("cpu-16k", "fp32", "index")]
    # All of them are measured beside torch.compile.
    assert plan[: baselines.COMPILED] == large
    assert {dtype for name, dtype, _ in plan if name == cpu_goals.SMALL} == {"bf16", "fp32"}
    assert {("cpu-16k", dtype, "mask") for dtype in ("bf16", "fp32")} | {
        ("cpu-16k", "fp16", "index")
    } <= set(plan)


def test_shapes_are_consistent():
    for shape in shapes.BY_NAME.values():
        assert 0 < shape.visual <= shape.tokens
    assert (shapes.CPU[0].rows, shapes.CPU[0].selected) == (16384, 12288)
    frozen, depth_3, norm = shapes.HEADS["cpu"]
    encoder = shapes.BY_NAME["cpu-4k-encoder"]
    assert 6 * frozen.flop == 4 * encoder.flop
    assert depth_3.flop - encoder.flop == 6 * encoder.selected * encoder.m**2
    assert (norm.flop, norm.size) == (depth_3.flop, "2,304 of 4,096 · 1024→512→512→768")
    case = shapes.case(TINY, torch.float32, torch.device("cpu"), "mask")
    index = shapes.case(TINY, torch.float32, torch.device("cpu"), "index")
    assert case.rows.sum() == TINY.selected
    assert torch.equal(case.rows.reshape(-1).nonzero().squeeze(1), index.rows)
    assert case.upstream != 1
    with pytest.raises(ValueError, match="shape: got"):
        shapes.plan(torch.device("cpu"), ["nonsense"])


COUNTS = [
    ({}, 6, 5),
    ({"frozen": True}, 4, 1),
    ({"depth": 1}, 3, 3),
    ({"depth": 3}, 9, 7),
    ({"depth": 3, "norm": "layer"}, 9, 8),
    ({"depth": 3, "norm": "layer", "frozen": True}, 6, 1),
]


@pytest.mark.parametrize(("head", "products", "gradients"), COUNTS)
def test_ours_and_eager_multiply_as_often_as_the_floor(head, products, gradients):
    def multiplied(step):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        return [e.name for e in profile.events() if e.name in ("aten::mm", "aten::addmm")]

    device = torch.device("cpu")
    shape = dataclasses.replace(TINY, **head)
    case = shapes.case(shape, torch.float32, device)
    assert len(multiplied(baselines.floor(case))) == products
    assert shape.flop == 2 * shape.selected * shape.weights * products // shape.depth
    for name in ("ours-torch", "eager"):
        step = baselines.step(baselines.BY_NAME[name].build(), case)
        assert len(multiplied(step)) == products
        assert len(step()) == gradients


def test_a_baseline_of_two_layers_is_left_out_for_other_heads():
    for head in ({"depth": 3}, {"norm": "rms"}, {"depth": 1}):
        shape = dataclasses.replace(TINY, **head)
        lines = {
            line["peer"]: line
            for line in suite.measure(shape, "fp32", current(), ["viral", "eager"], 0.0, False)
        }
        assert "two layers alone" in lines["viral"]["unavailable"]
        assert lines["eager"]["median_ms"] > 0


@pytest.mark.parametrize("head", [{"depth": 3, "norm": "layer"}, {"depth": 1, "frozen": True}])
def test_the_lower_bound_has_the_products_of_the_case(head):
    shape = dataclasses.replace(TINY, **head)
    case = shapes.case(shape, torch.float64, torch.device("cpu"))
    dx, *dws = baselines.floor(case)()
    assert dx.shape == (shape.selected, shape.d)
    weights = [case.tensors[f"w{i}"] for i in range(1, shape.depth + 1)]
    assert [dw.shape for dw in dws] == [w.shape for w in weights]
    dy = case.tensors["anchor"].flatten(0, 1)[case.rows]
    for w in reversed(weights):
        dy = dy @ w
    torch.testing.assert_close(dx, dy)
