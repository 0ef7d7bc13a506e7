"""The shapes that are measured, and the plan of a device."""

import pytest
import torch

from bench import baselines, cpu_goals, shapes

from .support import TINY


def test_the_plan_of_a_cpu():
    plan = [(shape.name, dtype, rows) for shape, dtype, rows in shapes.plan(torch.device("cpu"))]
    assert len(set(plan)) == len(plan)
    assert {name for name, _, _ in plan} == {shape.name for shape in shapes.CPU}
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
    case = shapes.case(TINY, torch.float32, torch.device("cpu"), "mask")
    index = shapes.case(TINY, torch.float32, torch.device("cpu"), "index")
    assert case.rows.sum() == TINY.selected
    assert torch.equal(case.rows.reshape(-1).nonzero().squeeze(1), index.rows)
    assert case.upstream != 1
    with pytest.raises(ValueError, match="shape: got"):
        shapes.plan(torch.device("cpu"), ["nonsense"])
