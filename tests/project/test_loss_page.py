"""docs/loss.md quotes real messages, and its numbers come from the code."""

import re

import pytest
import torch

from pre_kernels import PreHead
from pre_kernels.check import cases
from verify import ROOT


def page() -> str:
    return (ROOT / "docs" / "loss.md").read_text(encoding="utf-8")


def test_the_quoted_messages_are_real() -> None:
    quoted = re.findall(r"^```text\n(\w+: got .*)\n```$", page(), re.MULTILINE)
    head = PreHead(4)
    hidden = torch.randn(6, 4)
    with pytest.raises(TypeError) as wrong_dtype:
        head(hidden.double(), hidden)
    with pytest.raises(ValueError, match="capacity") as too_many:
        head(hidden, hidden, rows=torch.ones(6, dtype=torch.bool), capacity=2)
    assert quoted == [str(wrong_dtype.value), str(too_many.value)]


def test_the_example_of_memory_follows_the_formula() -> None:
    shape = cases.Shape("as on the page", 1, 16384, 9216, 4096, 4096, 4096, "")
    peak = cases.formula(shape, torch.bfloat16, "blas", torch.device("cuda"))
    default = cases.workspace("blas", torch.device("cuda"), torch.bfloat16)
    mib = [round(size / 2**20) for size in (default, peak - default, peak)]
    said = '9,216 rows of width 4,096 in bfloat16 with "blas" fit one chunk'
    assert f"{said}: {mib[0]} MiB + {mib[1]} MiB = {mib[2]} MiB." in " ".join(page().split())
