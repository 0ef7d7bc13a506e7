"""The table of implementations that are measured: ours and the baselines. Each computes the loss
and gradients of a training step on the same inputs.

A new baseline is a row with its loss function, of the signature of `reference.pre_loss`, and the
reason why it may be unavailable. Records and options call each of them a peer.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pre_kernels import fused_pre_loss, reference
from pre_kernels.check import cases
from pre_kernels.check.rule import Case
from pre_kernels.loss import fp8_unavailable, unavailable

from . import compositions

step, floor, Step = cases.step, cases.floor, cases.Step
Missing = Callable[[torch.device, torch.dtype], str | None]

# Number of entries of the plan that are measured with a compiled baseline, and with a costly one.
# Compilation takes half a minute for each entry with the former, and minutes with the latter.
COMPILED = 10
COSTLY = 2


@dataclass(frozen=True)
class Baseline:
    name: str
    what: str
    # Makes the loss function. None for the six bare matmuls, which have no loss.
    build: Callable[[], Callable[..., Tensor]] | None
    # Says why the baseline cannot run on a device in a dtype. None if it can.
    missing: Missing = lambda device, dtype: None
    # If the check of ours fails, the run fails. If that of a baseline fails, it is left out.
    ours: bool = False
    # It is measured with this many entries of the plan, the first ones. Some compile for minutes.
    max_plan_entries: float = math.inf
    # seconds that its first step compiles for, about
    compiles: float = 0.0
    # Options of the loss, if it supports only these.
    options: Mapping[str, Any] = field(default_factory=dict)
    # False if it does not support biases.
    biases: bool = True
    # False if it supports only two layers, without a norm.
    any_head: bool = True
    # Limit of the relative RMS error of each gradient, for a baseline that cannot keep the error
    # rule.
    gate: float | None = None


def _triton_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "no GPU here, and Triton's interpreter is never timed"
    return unavailable(device, dtype)


def _fp8_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _triton_missing(device, dtype) or fp8_unavailable(device):
        return reason
    return None if dtype == torch.bfloat16 else "measured only beside bfloat16 matmuls"


def _epilogue_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        return "the epilogue belongs to cuBLASLt; a CPU makes two passes of it"
    return None


def _liger_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def _quack_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("quack") is None:
        return "quack-kernels is not installed"
    if device.type != "cuda" or torch.version.hip is not None:
        return "its kernels need an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "its matmuls are measured on Hopper and newer"
    return "its matmuls need half precision" if dtype == torch.float32 else None


def _ours(impl: str, **options: Any) -> Callable[..., Tensor]:
    return partial(fused_pre_loss, impl=impl, **options)


BASELINES = [
    Baseline(
        "ours-blas",
        "fused_pre_loss, impl='blas'",
        lambda: _ours("blas"),
        _triton_missing,
        ours=True,
    ),
    Baseline(
        "ours-triton",
        "fused_pre_loss, impl='triton'",
        lambda: _ours("triton"),
        _triton_missing,
        ours=True,
    ),
    Baseline("ours-torch", "fused_pre_loss, impl='torch'", lambda: _ours("torch"), ours=True),
    Baseline(
        "ours-fp8",
        "fused_pre_loss, impl='blas', precision='fp8'; not within the error rule, but within a "
        "rule of its own",
        lambda: _ours("blas", precision="fp8"),
        _fp8_missing,
        ours=True,
        gate=0.1,
    ),
    Baseline("eager", "reference.pre_loss and autograd", lambda: reference.pre_loss),
    Baseline(
        "compile",
        "the same under torch.compile, default mode",
        compositions.compiled,
        max_plan_entries=COMPILED,
        compiles=30.0,
    ),
    Baseline(
        "compile-max",
        "the same under torch.compile, mode='max-autotune-no-cudagraphs'",
        partial(compositions.compiled, mode="max-autotune-no-cudagraphs"),
        max_plan_entries=COSTLY,
        compiles=120.0,
    ),
    Baseline(
        "addmm-activation",
        "bias and gelu in cuBLASLt's epilogue (torch._addmm_activation), whose gelu is the tanh "
        "one: compared with eager's gelu_tanh; the backward repeats the first matmul, 7 instead "
        "of 6",
        lambda: compositions.addmm_activation,
        _epilogue_missing,
        any_head=False,
        options={"activation": "gelu_tanh"},
    ),
    Baseline(
        "quack",
        "QuACK's MLP without biases, gelu_tanh in the epilogues of its matmuls, then the cosine "
        "loss under torch.compile: compared with eager's gelu_tanh without biases",
        compositions.quack,
        _quack_missing,
        max_plan_entries=COSTLY,
        compiles=120.0,
        options={"activation": "gelu_tanh"},
        biases=False,
        any_head=False,
    ),
    Baseline(
        "liger",
        "first linear and gelu in eager, then Liger-Kernel's chunked distillation loss with the "
        "identity as the teacher's weight, which adds 2·N·z² FLOP; it sums gradients in the "
        "parameters' dtype",
        compositions.liger,
        _liger_missing,
        max_plan_entries=COSTLY,
        compiles=60.0,
        any_head=False,
    ),
    Baseline(
        "viral",
        "VIRAL's method: the predictor over all tokens, a loop over samples",
        lambda: compositions.viral,
        any_head=False,
    ),
    Baseline("floor", "the bare matmuls, three for each weight, on rows already gathered", None),
]
BY_NAME = {baseline.name: baseline for baseline in BASELINES}


def planned(number: int) -> list[str]:
    """Return the names of the baselines that entry `number` of the plan is measured with."""
    return [baseline.name for baseline in BASELINES if number < baseline.max_plan_entries]


def own_case(baseline: Baseline, case: Case) -> Case:
    """Return the case with the options that the baseline needs, and without biases if it does not
    support them."""
    tensors = case.tensors if baseline.biases else {**case.tensors, "b1": None, "b2": None}
    return replace(case, tensors=tensors, options={**case.options, **baseline.options})
