"""PreHead as a module around the loss."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from pre_kernels import PreHead, reference


def test_forward_is_the_loss_of_its_own_parameters():
    head = PreHead(8, 12, 6, activation="silu", loss="mse")
    hidden, anchor = torch.randn(2, 5, 8), torch.randn(2, 5, 6)
    rows = torch.rand(2, 5) < 0.6
    got = head(hidden, anchor, rows, reduction="sum")
    parameters = head.w1, head.b1, head.w2, head.b2
    want = reference.pre_loss(
        hidden, anchor, *parameters, rows, activation="silu", loss="mse", reduction="sum"
    )
    torch.testing.assert_close(got, want)
    assert head(hidden, anchor, loss="cosine") != head(hidden, anchor)


def test_widths_default_to_dim():
    head = PreHead(8)
    assert head.w1.shape == head.w2.shape == (8, 8)
    assert (head.hidden_dim, head.out_dim) == (8, 8)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_raw_and_named(bias):
    head = PreHead(8, 12, 6, bias=bias, dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    weights = {"w1": (12, 8), "w2": (6, 12)}
    assert shapes == (weights | {"b1": (12,), "b2": (6,)} if bias else weights)
    assert all(type(p) is nn.Parameter and p.dtype == torch.bfloat16 for p in head.parameters())


LAYER_NORM = {"norm_weight": (8,), "norm_bias": (8,)}
RMS_NORM = {"norm_weight": (8,)}
SHAPES = [
    ({"depth": 1}, {"w1": (6, 8), "b1": (6,)}),
    ({"depth": 1, "norm": "rms", "bias": False}, {"w1": (6, 8)} | RMS_NORM),
    ({"norm": "layer", "bias": False}, {"w1": (12, 8), "w2": (6, 12)} | RMS_NORM),
    (
        {"depth": 3},
        {"w1": (12, 8), "b1": (12,), "w2": (12, 12), "b2": (12,), "w3": (6, 12), "b3": (6,)},
    ),
    ({"depth": 1, "norm": "layer"}, {"w1": (6, 8), "b1": (6,)} | LAYER_NORM),
    ({"depth": 1, "norm": "rms"}, {"w1": (6, 8), "b1": (6,)} | RMS_NORM),
]


@pytest.mark.parametrize(("options", "shapes"), SHAPES)
def test_every_depth_and_norm(options, shapes):
    """The parameters, their first values, and the loss; copies and files have all of them."""
    head = PreHead(8, 12, 6, activation="silu", norm_eps=0.1, **options)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == shapes
    assert head.shapes == shapes
    assert {name: tuple(x.shape) for name, x in head.state_dict().items()} == shapes
    with torch.no_grad():
        for p in head.parameters():
            p.uniform_(-1, 1)
    hidden, anchor = torch.randn(2, 5, 8), torch.randn(2, 5, 6)
    rows = torch.rand(2, 5) < 0.6
    parameters = {**dict.fromkeys(("w1", "b1", "w2", "b2")), **dict(head.named_parameters())}
    options = {"norm": head.norm, "norm_eps": 0.1, "activation": "silu"}
    want = reference.pre_loss(hidden, anchor, **parameters, rows=rows, **options)
    torch.testing.assert_close(head(hidden, anchor, rows), want)
    assert f"depth={head.depth}, norm={head.norm!r}" in repr(head)
    twins = [copy.deepcopy(head), pickle.loads(pickle.dumps(head))]
    head.reset_parameters()
    for name, p in head.named_parameters():
        if name.startswith("norm"):
            assert p.eq(1 if name == "norm_weight" else 0).all()
        else:
            fan_in = shapes[name.replace("b", "w")][1]
            assert 0 < p.abs().max() <= fan_in**-0.5
    assert head(hidden, anchor, rows) != want
    head.load_state_dict(twins[0].state_dict(), strict=True)
    for twin in (*twins, head):
        torch.testing.assert_close(twin(hidden, anchor, rows), want)


def test_heads_of_another_depth_or_norm_do_not_load_each_others_states():
    states = {repr(options): PreHead(8, **options).state_dict() for options, _ in SHAPES}
    for options, _ in SHAPES:
        for other, state in states.items():
            if other != repr(options) and state.keys() != states[repr(options)].keys():
                with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
                    PreHead(8, **options).load_state_dict(state, strict=True)


def test_initialised_as_linear_layers_are():
    torch.manual_seed(0)
    head = PreHead(400, 100)
    for weight, bound in (
        (head.w1, 1 / 20),
        (head.b1, 1 / 20),
        (head.w2, 1 / 10),
        (head.b2, 1 / 10),
    ):
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
    head.w1.data.fill_(7)
    head.reset_parameters()
    assert head.w1.abs().max() <= 1 / 20


def test_copies_pickles_and_loads():
    head = PreHead(8, 12, 6, loss="smooth_l1")
    hidden, anchor = torch.randn(5, 8), torch.randn(5, 6)
    other = PreHead(8, 12, 6, loss="smooth_l1")
    other.load_state_dict(head.state_dict())
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), other):
        assert torch.equal(twin(hidden, anchor), head(hidden, anchor))
    assert "dim=8, hidden_dim=12, out_dim=6" in repr(head)


def test_it_learns():
    torch.manual_seed(0)
    head = PreHead(16)
    hidden = torch.randn(64, 16)
    anchor = hidden @ torch.randn(16, 16)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = head(hidden, anchor)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > -0.3
    assert losses[-1] < -0.95


def test_importing_the_package_imports_little():
    late = {"triton", "transformers", "sklearn", "matplotlib", "einops"}
    code = f"import sys, pre_kernels; print({late} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
