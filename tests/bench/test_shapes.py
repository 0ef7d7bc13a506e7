"""The shapes that are measured, and the plan of a device."""

import dataclasses

import pytest
import torch

from bench import baselines, cpu_goals, shapes

from .support import TINY


def test_the_plan_of_a_cpu():
    plan = [(shape.name, dtype, rows) for shape, dtype, rows in shapes.plan(torch.device("cpu"))]
    assert len(set(plan)) == len(plan)
    assert {name for name, _, _ in plan} == {
        shape.name for shape in [*shapes.CPU, shapes.FROZEN[1]]
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
    frozen = shapes.FROZEN[1]
    assert 6 * frozen.flop == 4 * shapes.BY_NAME["cpu-4k-encoder"].flop
    case = shapes.case(TINY, torch.float32, torch.device("cpu"), "mask")
    index = shapes.case(TINY, torch.float32, torch.device("cpu"), "index")
    assert case.rows.sum() == TINY.selected
    assert torch.equal(case.rows.reshape(-1).nonzero().squeeze(1), index.rows)
    assert case.upstream != 1
    with pytest.raises(ValueError, match="shape: got"):
        shapes.plan(torch.device("cpu"), ["nonsense"])


def test_a_frozen_head_has_two_products_less():
    def products(step):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        return [e.name for e in profile.events() if e.name in ("aten::mm", "aten::addmm")]

    device = torch.device("cpu")
    for shape, wanted in ((TINY, 6), (dataclasses.replace(TINY, frozen=True), 4)):
        case = shapes.case(shape, torch.float32, device)
        assert len(products(baselines.floor(case))) == wanted
        ours = baselines.step(baselines.BY_NAME["ours-torch"].build(), case)
        eager = baselines.step(baselines.BY_NAME["eager"].build(), case)
        assert len(products(ours)) == len(products(eager)) == wanted
        assert len(ours()) == len(eager()) == (1 if wanted == 4 else 5)
