"""Loss and gradients are those that the public code of other projects computed from the same
tensors.

`tests/data/theirs/README.md` says how the values came about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pre_kernels import fused_pre_loss, reference
from verify import ROOT

load_file = pytest.importorskip("safetensors.torch").load_file

FOLDER = ROOT / "tests" / "data" / "theirs"
PARAMETERS = ("w1", "b1", "w2", "b2", "w3", "b3", "norm_weight", "norm_bias")


class Theirs(NamedTuple):
    """How ours gives a project's loss: constant + factor · the mean over the calls. The options
    `images` and `row_weight` "sample" stand for tensors that depend on the samples."""

    options: dict[str, Any]
    constant: float = 0.0
    factor: float = 1.0


SILU = {"activation": "silu"}
GRAM = {"loss": "gram", "images": "sample"}
CASES = {
    "viral.direct": Theirs(SILU),
    "viral.shared": Theirs(SILU),
    "viral.several": Theirs(SILU),
    "viral.gram": Theirs({**SILU, **GRAM}),
    "viral.gram_several": Theirs({**SILU, **GRAM}),
    "viral.gram_plain": Theirs(GRAM),
    "laver.gram": Theirs({"loss": "gram", "images": "batch"}),
    "pointalign.align": Theirs(SILU, constant=1.0),
    "blindvla.align": Theirs({**SILU, "norm": "layer"}),
    # BlindVLA adds the losses of its three layers.
    "blindvla.several": Theirs({**SILU, "norm": "layer"}, factor=3.0),
    "spatial_forcing.openvla": Theirs({"norm": "layer"}, constant=1.0),
    # openpi takes the mean over samples of the mean over the tokens of a sample.
    "spatial_forcing.openpi": Theirs({"norm": "layer", "row_weight": "sample"}, constant=1.0),
}


class Kept:
    """The tensors of a case: inputs, and the loss and gradients to compare with."""

    def __init__(self, name: str) -> None:
        work, _, case = name.partition(".")
        file = load_file(FOLDER / f"{work}.safetensors")
        of_case = {
            key.removeprefix(f"{case}."): file[key] for key in file if key.startswith(f"{case}.")
        }
        self.anchor, self.mask = of_case.pop("anchor"), of_case.pop("mask")
        self.wanted = {"loss": of_case.pop("loss")}
        weight = of_case.pop("weight")
        self.inputs = {key: x for key, x in of_case.items() if not key.startswith("grad.")}
        self.wanted |= {key: of_case[f"grad.{key}"] / weight for key in self.inputs}

    def run(
        self,
        function: Callable[..., Tensor],
        theirs: Theirs,
        dtype: torch.dtype,
        device: torch.device,
        **extra: Any,
    ) -> dict[str, Tensor]:
        """Return the project's loss, and its gradients by our names, as `function` computes
        them."""
        leaves = {key: x.to(device, dtype).requires_grad_() for key, x in self.inputs.items()}
        hidden = [leaves[key] for key in leaves if key.startswith("hidden.")]
        heads = [
            {name: leaves.get(f"{i}.{name}") for name in PARAMETERS}
            for i in range(len(hidden))
            if f"{i}.w1" in leaves
        ]
        anchor, mask = self.anchor.to(device, dtype), self.mask.to(device)
        if not heads:
            # The identity stands for no head. Zeros behind an anchor do not change its Gram matrix.
            width = hidden[0].shape[-1]
            anchor = F.pad(anchor, (0, width - anchor.shape[-1]))
            identity = torch.eye(width, dtype=dtype, device=device)
            heads = [dict.fromkeys(PARAMETERS) | {"w1": identity}]
        if len(heads) < len(hidden):
            anchor, mask = anchor.repeat(len(hidden), 1), mask.repeat(len(hidden), 1)
            hidden = [torch.cat(hidden)]
        sample = mask.nonzero()[:, 0]
        options = dict(theirs.options)
        if options.get("images") == "sample":
            options["images"] = sample
        if options.get("row_weight") == "sample":
            options["row_weight"] = 1 / mask.sum(1)[sample].to(dtype)
        losses = [
            function(layer, anchor, rows=mask, **head, **options, **extra)
            for layer, head in zip(hidden, heads, strict=True)
        ]
        loss = theirs.constant + theirs.factor * torch.stack(losses).mean()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Assert that each tensor is within 16 units of rounding of its largest element, and the loss
    of 1. The sums cancel: eager's gradients in float32 are up to 11 units away."""
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        scale = 1.0 if name == "loss" else expected.abs().max().item()
        error = (found[name].cpu().double() - expected).abs().max().item()
        assert error <= 16 * torch.finfo(dtype).eps * scale, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_equal(name: str, dtype: torch.dtype, device: torch.device) -> None:
    kept = Kept(name)
    close(kept.run(reference.pre_loss, CASES[name], dtype, device), kept.wanted, dtype)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("torch", torch.float64),
        ("torch", torch.float32),
        ("blas", torch.float32),
        ("triton", torch.float32),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_the_fused_loss_is_equal(
    name: str, impl: str, dtype: torch.dtype, device: torch.device
) -> None:
    kept = Kept(name)
    close(kept.run(fused_pre_loss, CASES[name], dtype, device, impl=impl), kept.wanted, dtype)


def test_every_case_of_the_files_is_compared() -> None:
    """The table of cases and the files have the same names, and no file is large."""
    found = set()
    for file in FOLDER.glob("*.safetensors"):
        assert file.stat().st_size <= 60 * 1024
        found |= {f"{file.stem}.{key.partition('.')[0]}" for key in load_file(file)}
    assert found == set(CASES)
