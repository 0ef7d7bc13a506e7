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
