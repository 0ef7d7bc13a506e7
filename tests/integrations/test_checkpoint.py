"""handle.save and handle.load: the head comes back bit for bit, and errors name a wrong folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pre_kernels.integrations import apply_pre
from pre_kernels.integrations.checkpoint import CONFIG, WEIGHTS
from verify import ROOT

from .support.tiny.models import build

DATA = ROOT / "tests" / "data"


@pytest.mark.parametrize("layer", [2, [1, 3]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_roundtrip(tmp_path: Path, layer: Any, bias: bool) -> None:
    first = apply_pre(
        build("llava"), layer, hidden_dim=20, loss="mse", activation="relu", bias=bias
    )
    first.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, WEIGHTS]
    second = apply_pre(
        build("llava", seed=1), layer, hidden_dim=20, loss="mse", activation="relu", bias=bias
    )
    before = dict(second.head.named_parameters())
    second.load(tmp_path / "new" / "folder")
    # The tensors must be the same objects, because an optimizer refers to them.
    assert all(p is before[name] for name, p in second.head.named_parameters())
    assert all(
        torch.equal(p, q)
        for p, q in zip(first.head.parameters(), second.head.parameters(), strict=True)
    )


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_both_files_have_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
    handle = apply_pre(build("llava"))
    before = os.umask(umask)
    try:
        handle.save(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys((CONFIG, WEIGHTS), 0o666 & ~umask)


def test_load_casts(tmp_path: Path) -> None:
    first = apply_pre(build("llava"))
    first.save(tmp_path)
    second = apply_pre(build("llava").bfloat16())
    second.load(tmp_path)
    assert torch.equal(second.head.w1, first.head.w1.bfloat16())


@pytest.mark.parametrize("folder", sorted(DATA.glob("head-*")), ids=lambda folder: folder.name)
def test_heads_of_earlier_versions(folder: Path) -> None:
    handle = apply_pre(build("llava"), hidden_dim=2, loss="mse", activation="silu")
    handle.load(folder)
    found = load_file(folder / WEIGHTS)
    assert found.keys() == {"w1", "b1", "w2", "b2"}
    assert all(torch.equal(p, found[name]) for name, p in handle.head.named_parameters())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"depth": 1}, {"w1", "b1"}),
        ({"depth": 3, "bias": False}, {"w1", "w2", "w3"}),
        ({"depth": 1, "norm": "rms", "bias": False}, {"w1", "norm_weight"}),
        (
            {"depth": 3, "norm": "layer"},
            {"w1", "b1", "w2", "b2", "w3", "b3", "norm_weight", "norm_bias"},
        ),
    ],
)
def test_heads_of_every_depth_and_norm(
    tmp_path: Path, options: dict[str, Any], names: set[str]
) -> None:
    first = apply_pre(build("llava"), **options)
    with torch.no_grad():
        for parameter in first.head.parameters():
            parameter.uniform_(-1, 1)
    first.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["depth"], config["norm"]) == (options["depth"], options.get("norm"))
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == names
    second = apply_pre(build("llava", seed=1), **options)
    second.load(tmp_path)
    assert all(torch.equal(p, found[name]) for name, p in second.head.named_parameters())
    with pytest.raises(ValueError, match=f"depth: .* says {options['depth']}, this handle has 2"):
        apply_pre(build("llava"), bias=options.get("bias", True)).load(tmp_path)


def test_a_file_without_depth_and_norm_has_two_layers_and_none(tmp_path: Path) -> None:
    apply_pre(build("llava")).save(tmp_path)
    changed_config(depth=..., norm=..., anchor_norm=...)(tmp_path)
    apply_pre(build("llava")).load(tmp_path)
    with pytest.raises(ValueError, match=r"depth: .* says 2, this handle has 3"):
        apply_pre(build("llava"), depth=3).load(tmp_path)
    with pytest.raises(ValueError, match=r"norm: .* says None, this handle has 'rms'"):
        apply_pre(build("llava"), norm="rms").load(tmp_path)


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
        ({"depth": 3}, "depth: .* says 2, this handle has 3"),
        ({"norm": "layer"}, "norm: .* says None, this handle has 'layer'"),
    ],
)
def test_another_head(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    apply_pre(build("llava")).save(tmp_path)
    with pytest.raises(ValueError, match=message):
        apply_pre(build("llava"), **options).load(tmp_path)


def test_what_need_not_agree(tmp_path: Path) -> None:
    """Settings that may differ: the fraction of drawn terms, the weights of images if they are
    equal anyway, and settings that older files lack."""
    apply_pre(build("llava"), level="image").save(tmp_path)
    apply_pre(build("llava"), level="image", weighting="image", fraction=0.5, weight=0.1).load(
        tmp_path
    )
    apply_pre(build("llava"), weighting="image").save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config.pop("weighting") == "image"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    apply_pre(build("llava")).load(tmp_path)


def test_missing(tmp_path: Path) -> None:
    handle = apply_pre(build("llava"))
    with pytest.raises(FileNotFoundError, match=r"nowhere' is not a directory"):
        handle.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"json' is missing"):
        handle.load(tmp_path)
    handle.save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"safetensors' is missing, got pre_head\.json of a save"):
        handle.load(tmp_path)
    handle.save(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"json' is missing, got pre_head\.safetensors of a save"):
        handle.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b'{"format": 99}'])
def test_broken_config(tmp_path: Path, content: bytes) -> None:
    handle = apply_pre(build("llava"))
    handle.save(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=r"json'?: (not valid JSON|format)"):
        handle.load(tmp_path)


def changed_config(**more: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | more
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return change


def changed_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return write


def cut(name: str, share: float) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: int(share * (folder / name).stat().st_size)]
    )


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    *[
        (WEIGHTS, cut(WEIGHTS, share), "not a valid safetensors file")
        for share in (0, 0.0005, 0.01, 0.3, 0.6, 0.9999)
    ],
    *[(CONFIG, cut(CONFIG, share), "not valid JSON") for share in (0.2, 0.9)],
    (CONFIG, changed_config(format=0), "format 0, want 1"),
    (CONFIG, changed_config(format=2), "format 2, want 1"),
    (CONFIG, changed_config(format="1"), "format '1', want 1"),
    (CONFIG, changed_config(format=...), "format None, want 1"),
    (CONFIG, changed_config(activation=...), "says None, this handle has 'gelu'"),
    (
        WEIGHTS,
        changed_weights(lambda t: t.pop("0.b2")),
        r"holds .*'0.b1', '0.w1'.*this head has .*'0.b2'",
    ),
    (WEIGHTS, changed_weights(lambda t: t.update(w3=torch.ones(2))), r"holds .*'w3'"),
    (
        WEIGHTS,
        changed_weights(lambda t: t.update({"1.w2": torch.ones(32, 8)})),
        r"`1.w2` has shape \(32, 8\)",
    ),
    (
        WEIGHTS,
        changed_weights(lambda t: t.update({"1.b2": torch.ones(32).int()})),
        r"`1.b2` has dtype torch.int32",
    ),
]


def test_a_broken_checkpoint_is_named_and_loads_nothing(tmp_path: Path) -> None:
    """A module with two heads, of which the second may be the broken one."""
    apply_pre(build("llava", seed=1), [1, 3]).save(tmp_path)
    good = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    handle = apply_pre(build("llava"), [1, 3])
    before = {n: p.detach().clone() for n, p in handle.head.named_parameters()}
    for file, change, message in BROKEN:
        change(tmp_path)
        with pytest.raises(ValueError, match=message) as caught:
            handle.load(tmp_path)
        assert str(tmp_path / file) in str(caught.value)
        assert all(torch.equal(p, before[n]) for n, p in handle.head.named_parameters())
        for name, content in good.items():
            (tmp_path / name).write_bytes(content)
    # A later version of the same format may have more settings.
    changed_config(pre_kernels="99.0", later="?")(tmp_path)
    handle.load(tmp_path)
    assert not torch.equal(handle.head[0].w1, before["0.w1"])


def test_a_save_that_fails_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = apply_pre(build("llava"))
    handle.save(tmp_path)
    before = [(tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    handle.head.reset_parameters()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        handle.save(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)] == before


def test_weights_that_are_not_what_the_config_says(tmp_path: Path) -> None:
    small, handle = apply_pre(build("llava"), hidden_dim=8), apply_pre(build("llava"))
    before = handle.head.w1.detach().clone()
    small.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"hidden_dim": 32}))
    with pytest.raises(
        ValueError, match=r"`w1` has shape \(8, 32\), this head's \(32, 32\)|`b1` has shape \(8,\)"
    ):
        handle.load(tmp_path)
    assert torch.equal(handle.head.w1, before)


def test_sharded_head(tmp_path: Path) -> None:
    handle = apply_pre(build("llava"))
    handle.head.w1 = nn.Parameter(torch.empty(0))  # like a parameter that ZeRO-3 has split
    with pytest.raises(RuntimeError, match=r"head: `w1` is sharded"):
        handle.save(tmp_path)
