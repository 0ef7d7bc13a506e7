"""Tiny models with PRe attached: one training step, and a head that is the same in each run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pre_kernels.integrations import apply_pre

from .by_hand import gradients
from .tiny.models import FAMILIES, Batch, batch, build

every_family = pytest.mark.parametrize("family", FAMILIES)


def run(
    family: str, data: Batch | None = None, checkpointing: bool | None = None, **options: Any
) -> Any:
    """Train a fresh model with PRe for one step: (loss, gradients, handle, model)."""
    model = build(family)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing}
        )
    handle = apply_pre(model, **options)
    loss = model(**(data or batch(family)).inputs).loss
    loss.backward()
    return loss.detach(), gradients(model), handle, model


def same_head(handle: Any) -> None:
    """A head that does not depend on the state of the random generator."""
    with torch.no_grad():
        for parameter in handle.head.parameters():
            parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter).sin())
