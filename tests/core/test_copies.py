"""Copies of a PreHead, and the files that hold it, including those of earlier versions."""

import copy
import io
import json
import pickle

import pytest
import torch

from pre_kernels import PreHead
from verify import ROOT

from .support import head_and_inputs

DATA = ROOT / "tests" / "data"


def test_copies_have_memory_of_their_own(impl, device):
    head, hidden, anchor = head_and_inputs(device=device, loss="mse", activation="silu")
    head.w2.requires_grad_(False)
    head.eval()
    loss = head(hidden, anchor, impl=impl)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    twins = [
        copy.deepcopy(head),
        pickle.loads(pickle.dumps(head)),
        torch.load(file, weights_only=False),
    ]
    for twin in twins:
        assert type(twin) is PreHead
        assert not twin.training
        assert [p.requires_grad for p in twin.parameters()] == [
            p.requires_grad for p in head.parameters()
        ]
        assert (twin.loss, twin.activation, twin.dim) == ("mse", "silu", 16)
        assert torch.equal(twin(hidden, anchor, impl=impl), loss)
        with torch.no_grad():
            for p in twin.parameters():
                p.fill_(3)
    loss.backward()  # This loss was computed before the copies were made.
    assert torch.equal(head(hidden, anchor, impl=impl), loss)
    assert head.w1.grad.any()


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_needs_no_pickle(bias):
    head, hidden, anchor = head_and_inputs(bias=bias)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == (["w1", "b1", "w2", "b2"] if bias else ["w1", "w2"])
    other, *_ = head_and_inputs(seed=1, bias=bias)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(hidden, anchor), head(hidden, anchor))
    with pytest.raises(RuntimeError, match="b1"):
        PreHead(16, 8, 24, bias=not bias).load_state_dict(state, strict=True)


# The keys are the folders that `handle.save` of a version wrote, the values the losses below. The
# folders are never rewritten.
OLD = {"head-0.1.0": 0.4392769282}


@pytest.mark.parametrize("name", OLD)
def test_heads_of_earlier_versions_load_and_mean_the_same(name, impl, device):
    load_file = pytest.importorskip("safetensors.torch").load_file
    folder = DATA / name
    config = json.loads((folder / "pre_head.json").read_text())
    state = load_file(folder / "pre_head.safetensors")
    shapes = {"w1": (2, 32), "b1": (2,), "w2": (32, 2), "b2": (32,)}
    assert {name: tuple(x.shape) for name, x in state.items()} == shapes
    options = {name: config[name] for name in ("bias", "activation", "loss")}
    head = PreHead(config["dim"], config["hidden_dim"], config["out_dim"], **options).to(device)
    head.load_state_dict(state, strict=True)
    hidden = torch.linspace(-1, 1, 96, device=device).reshape(3, 32)
    loss = head(hidden, hidden.square().flip(0), impl=impl)
    assert loss.item() == pytest.approx(OLD[name], rel=1e-5)
