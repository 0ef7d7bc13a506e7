"""Who is measured: a table of peers, each one training step's loss and gradients on the same
inputs.

A new peer is a row: a loss function of the signature of `reference.pre_loss`, and why it may be
unavailable.
"""

from __future__ import annotations

import importlib
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
from pre_kernels.loss import unavailable

from . import compositions

step, floor, Step = cases.step, cases.floor, cases.Step
Missing = Callable[[torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Peer:
    name: str
    what: str
    build: (
        Callable[[], Callable[..., Tensor]] | None
    )  # makes the loss function; None: the floor, which has no loss
    missing: Missing = lambda device, dtype: None  # why it cannot run there
    ours: bool = (
        False  # a failed check of ours fails the run; that of another peer only leaves it out
    )
    first: float = (
        math.inf
    )  # of the plan's entries so many are measured with it: some compile for minutes
    options: Mapping[str, Any] = field(
        default_factory=dict
    )  # of the loss, where it can compute no other
    gate: float | None = (
        None  # relative rms error let through in each gradient, where the error rule cannot hold
    )


def _triton_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "no GPU here, and Triton's interpreter is never timed"
    return unavailable(device, dtype)


def _fp8_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _triton_missing(device, dtype)
    if (
        reason is None
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) < (8, 9)
    ):
        return "no fp8 products before sm_89"
    return reason or (
        None if dtype == torch.bfloat16 else "measured beside bfloat16 products alone"
    )


def _chunker_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    from torch._inductor import config

    return None if hasattr(config, "auto_chunker") else "this torch's inductor has no auto-chunker"


def _epilogue_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    return (
        "the epilogue is cuBLASLt's; a CPU makes two passes of it" if device.type == "cpu" else None
    )


def _liger_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def _ours(impl: str, **options: Any) -> Callable[..., Tensor]:
    return partial(fused_pre_loss, impl=impl, **options)


COMPILED, COSTLY = 7, 2  # entries of the plan; half a minute of compilation each, and minutes

PEERS = [
    Peer(
        "ours-blas",
        "fused_pre_loss, impl='blas'",
        lambda: _ours("blas"),
        _triton_missing,
        ours=True,
    ),
    Peer(
        "ours-triton",
        "fused_pre_loss, impl='triton'",
        lambda: _ours("triton"),
        _triton_missing,
        ours=True,
    ),
    Peer("ours-torch", "fused_pre_loss, impl='torch'", lambda: _ours("torch"), ours=True),
    Peer(
        "ours-fp8",
        "fused_pre_loss, impl='blas', precision='fp8'; not within the error rule, but within a rule of its own",
        lambda: _ours("blas", precision="fp8"),
        _fp8_missing,
        ours=True,
        gate=0.1,
    ),
    Peer("eager", "reference.pre_loss and autograd", lambda: reference.pre_loss),
    Peer(
        "compile",
        "the same under torch.compile, default mode",
        compositions.compiled,
        first=COMPILED,
    ),
    Peer(
        "compile-max",
        "the same under torch.compile, mode='max-autotune-no-cudagraphs'",
        partial(compositions.compiled, mode="max-autotune-no-cudagraphs"),
        first=COSTLY,
    ),
    Peer(
        "compile-chunked",
        "the same under torch.compile with inductor's auto-chunker, its threshold lifted",
        compositions.compiled_in_chunks,
        _chunker_missing,
        first=COSTLY,
    ),
    Peer(
        "addmm-activation",
        "bias and gelu in cuBLASLt's epilogue (torch._addmm_activation), whose gelu is the tanh one: compared with "
        "eager's gelu_tanh; the backward repeats the first product, 7 instead of 6",
        lambda: compositions.addmm_activation,
        _epilogue_missing,
        options={"activation": "gelu_tanh"},
    ),
    Peer(
        "liger",
        "first linear and gelu in eager, then Liger-Kernel's chunked distillation loss with the identity as the "
        "teacher's weight, which adds 2·N·z² FLOP; it sums gradients in the parameters' dtype",
        compositions.liger,
        _liger_missing,
        first=COSTLY,
    ),
    Peer(
        "viral",
        "VIRAL's way: the predictor over all tokens, a loop over samples",
        lambda: compositions.viral,
    ),
    Peer("floor", "the six bare products, on rows already gathered", None),
]
BY_NAME = {peer.name: peer for peer in PEERS}


def planned(number: int) -> list[str]:
    """Names of those that entry `number` of the plan is measured with."""
    return [peer.name for peer in PEERS if number < peer.first]


def own_case(peer: Peer, case: Case) -> Case:
    """The case with the options that the peer insists on."""
    return replace(case, options={**case.options, **peer.options})
