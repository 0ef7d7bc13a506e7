"""handle.save and handle.load: the head comes back bit by bit, and a wrong folder is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pre_kernels.integrations import apply_pre
from pre_kernels.integrations.checkpoint import CONFIG, WEIGHTS
from tiny_models import build
from torch import nn


@pytest.mark.parametrize("layer", [2, [1, 3]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_roundtrip(tmp_path: Path, layer: Any, bias: bool) -> None:
    first = apply_pre(build("llava"), layer, hidden_dim=20, loss="mse", activation="relu", bias=bias)
    first.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, WEIGHTS]
    second = apply_pre(build("llava", seed=1), layer, hidden_dim=20, loss="mse", activation="relu", bias=bias)
    before = dict(second.head.named_parameters())
    second.load(tmp_path / "new" / "folder")
    assert all(p is before[name] for name, p in second.head.named_parameters())  # an optimizer keeps hold of them
    assert all(torch.equal(p, q) for p, q in zip(first.head.parameters(), second.head.parameters(), strict=True))


def test_load_casts(tmp_path: Path) -> None:
    first = apply_pre(build("llava"))
    first.save(tmp_path)
    second = apply_pre(build("llava").bfloat16())
    second.load(tmp_path)
    assert torch.equal(second.head.w1, first.head.w1.bfloat16())


def test_save_replaces(tmp_path: Path) -> None:
    handle = apply_pre(build("llava"))
    handle.save(tmp_path)
    with torch.no_grad():
        handle.head.w1.zero_()
    handle.save(tmp_path)
    handle.head.reset_parameters()
    handle.load(tmp_path)
    assert not handle.head.w1.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, r"layers: .* says \[2\], this handle has \[3\]"),
        ({"layer": [2]}, "several: .* says False, this handle has True"),
        ({"hidden_dim": 8}, "hidden_dim: .* says 32, this handle has 8"),
        ({"bias": False}, "bias: .* says True"),
        ({"loss": "mse"}, "loss: .* says 'cosine', this handle has 'mse'"),
        ({"activation": "silu"}, "activation: .* says 'gelu', this handle has 'silu'"),
        ({"level": "image"}, "level: .* says 'patch'"),
        ({"weighting": "image"}, "weighting: .* says 'token', this handle has 'image'"),
        ({"anchor": "pre_projector"}, "anchor: .* says 'pre_llm'"),
    ],
)
def test_another_head(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    apply_pre(build("llava")).save(tmp_path)
    with pytest.raises(ValueError, match=message):
        apply_pre(build("llava"), **options).load(tmp_path)


def test_what_need_not_agree(tmp_path: Path) -> None:
    """How many terms are drawn, how images weigh where they weigh the same anyway, what earlier files do not say."""
    apply_pre(build("llava"), level="image").save(tmp_path)
    apply_pre(build("llava"), level="image", weighting="image", fraction=0.5, weight=0.1).load(tmp_path)
    apply_pre(build("llava"), weighting="image").save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config.pop("weighting") == "image"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    apply_pre(build("llava")).load(tmp_path)


def test_missing(tmp_path: Path) -> None:
    handle = apply_pre(build("llava"))
    with pytest.raises(FileNotFoundError, match=r"nowhere' is no directory"):
        handle.load(tmp_path / "nowhere")
    handle.save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors' is missing"):
        handle.load(tmp_path)
    handle.save(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"json' is missing"):
        handle.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b'{"format": 99}'])
def test_broken_config(tmp_path: Path, content: bytes) -> None:
    handle = apply_pre(build("llava"))
    handle.save(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=r"json'?: (no valid JSON|format)"):
        handle.load(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 100, -5])
def test_broken_weights(tmp_path: Path, cut: int) -> None:
    handle = apply_pre(build("llava"))
    handle.save(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"no valid safetensors file"):
        handle.load(tmp_path)


def test_weights_that_are_not_what_the_config_says(tmp_path: Path) -> None:
    small, handle = apply_pre(build("llava"), hidden_dim=8), apply_pre(build("llava"))
    before = handle.head.w1.detach().clone()
    small.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"hidden_dim": 32}))
    with pytest.raises(ValueError, match=r"`w1` has shape \(8, 32\), this head's \(32, 32\)|`b1` has shape \(8,\)"):
        handle.load(tmp_path)
    assert torch.equal(handle.head.w1, before)


def test_sharded_head(tmp_path: Path) -> None:
    handle = apply_pre(build("llava"))
    handle.head.w1 = nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves outside the forward
    with pytest.raises(RuntimeError, match=r"head: `w1` is sharded"):
        handle.save(tmp_path)
