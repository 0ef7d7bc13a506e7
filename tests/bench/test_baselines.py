"""Each baseline computes the loss that it names, and is measured where it can run."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from bench import baselines, compositions, gpu_goals, shapes, suite
from pre_kernels.check.rule import Judge

from .support import TINY

COMPOSITIONS = {
    "viral": (lambda: compositions.viral, {}),
    # On a CPU the epilogue computes the erf gelu.
    "addmm-activation": (lambda: compositions.addmm_activation, {"activation": "gelu"}),
    "liger": (lambda: compositions.liger(compiled=False, chunk_size=64), {}),
}


@pytest.mark.parametrize("rows", shapes.ROWS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_are_within_the_error_rule(name, rows):
    assert name in baselines.BY_NAME
    if name == "liger":
        pytest.importorskip("liger_kernel.chunked_loss")
    build, options = COMPOSITIONS[name]
    case = shapes.case(TINY, torch.float32, torch.device("cpu"), rows)
    case.options = options
    assert Judge(case)(build()).failure is None


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((8, 9), None, "older than sm_90"),
        ((9, 4), "6.0", "only for NVIDIA"),
        ((9, 0), None, None),
    ],
)
def test_fp8_is_measured_where_the_loss_runs_it(monkeypatch, capability, hip, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "L4")
    monkeypatch.setattr(torch.version, "hip", hip)
    # This stands in for a GPU that runs Triton.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    missing = baselines.BY_NAME["ours-fp8"].missing
    found = missing(torch.device("cuda"), torch.bfloat16)
    assert found is None if reason is None else reason in found
    assert missing(torch.device("cuda"), torch.float32) is not None
    assert missing(torch.device("cpu"), torch.bfloat16) is not None


def test_what_is_compiled_for_minutes_is_measured_on_the_first_shapes_alone():
    assert set(baselines.planned(0)) == set(baselines.BY_NAME)
    assert set(baselines.planned(0)) - set(baselines.planned(2)) == {
        "compile-max",
        "quack",
        "liger",
    }
    assert set(baselines.planned(2)) - set(baselines.planned(baselines.COMPILED)) == {"compile"}
    plan = shapes.plan(torch.device("cuda"))
    assert plan[0] == (shapes.BY_NAME[gpu_goals.MAIN], "bf16", "index")
    assert (shapes.BY_NAME[gpu_goals.MAIN], "bf16", "mask") in plan
    # One goal is to be faster than torch.compile there.
    assert (shapes.BY_NAME[gpu_goals.SMALL], "bf16", "index") in plan[: baselines.COMPILED]
    assert {shape for shape, _, _ in plan} == {
        *shapes.GPU,
        *shapes.HEADS["cuda"],
    }
    for shape in shapes.HEADS["cuda"]:
        assert (shape, "bf16", "index") in plan[: baselines.COMPILED]


class StandIn(torch.nn.Module):
    """QuACK's MLP as far as the composition knows it: its arguments, the names of its weights, and
    what it computes."""

    def __init__(
        self, in_features, hidden_features=None, out_features=None, *, activation, device=None
    ):
        super().__init__()
        assert activation == "gelu_tanh_approx"
        self.fc1 = torch.nn.Linear(in_features, hidden_features, bias=False, device=device)
        self.fc2 = torch.nn.Linear(hidden_features, out_features, bias=False, device=device)

    def forward(self, input):
        assert input.stride(-1) == 1
        return self.fc2(F.gelu(self.fc1(input), approximate="tanh"))


@pytest.fixture
def quack(monkeypatch):
    """Return its baseline with the stand-in, which runs anywhere, and the functions that were
    compiled."""
    mlp = ModuleType("quack.mlp")
    mlp.MLP = StandIn
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.mlp", mlp)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    return replace(baselines.BY_NAME["quack"], missing=lambda *place: None), compiled


@pytest.mark.parametrize("rows", shapes.ROWS)
def test_quack_is_judged_and_timed_without_biases(rows, quack):
    baseline, compiled = quack
    case = shapes.case(TINY, torch.float32, torch.device("cpu"), rows)
    judges = {}
    result, step = suite.judged(baseline, case, judges)
    assert result["outside_rule"] is None
    assert compiled == [compositions._mean_cosine]
    dh, dw1, dw2 = step()
    assert (dh.shape, dw1.shape, dw2.shape) == ((2, 160, 128), (96, 128), (64, 96))
    # A case with biases, or with another activation, has its own judge.
    _, step = suite.judged(baselines.BY_NAME["eager"], case, judges)
    assert len(step()) == 5
    tanh = replace(baselines.BY_NAME["eager"], options=baseline.options)
    suite.judged(tanh, case, judges)
    assert len(judges) == 3
    assert case.tensors["b1"] is not None


def test_a_wrong_weight_of_quack_is_seen(quack, monkeypatch):
    baseline, _ = quack
    forward = StandIn.forward
    monkeypatch.setattr(StandIn, "forward", lambda self, x: forward(self, x) + 0.01 * x[:, :64])
    case = shapes.case(TINY, torch.float32, torch.device("cpu"))
    result, step = suite.judged(baseline, case, {})
    assert step is None
    assert "error" in result["failed"]


def test_quack_refuses_what_its_fused_products_do_not_take(quack):
    baseline, _ = quack
    case = shapes.case(replace(TINY, m=100), torch.float32, torch.device("cpu"))
    result, step = suite.judged(baseline, case, {})
    assert step is None
    assert "multiples of 8" in result["unavailable"]
    whole = shapes.case(TINY, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="no biases"):
        compositions.quack()(**whole.tensors, rows=whole.rows, activation="gelu_tanh")


def test_quack_is_measured_on_hopper_and_newer(monkeypatch):
    missing = baselines.BY_NAME["quack"].missing
    cuda = torch.device("cuda")
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert missing(cuda, torch.bfloat16) == "quack-kernels is not installed"
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    capability = (8, 9)
    assert "Hopper" in missing(cuda, torch.bfloat16)
    capability = (9, 0)
    assert missing(cuda, torch.bfloat16) is None
    assert missing(cuda, torch.float16) is None
    assert missing(cuda, torch.float32) is not None
    assert missing(torch.device("cpu"), torch.bfloat16) is not None
