"""Gradients that a scaler has scaled, and optimizers that accelerate has prepared."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from pre_kernels.integrations import apply_pre

from .support.attached import same_head
from .support.by_hand import gradients
from .support.tiny.models import batch, build


def test_fp16_with_a_gradient_scaler() -> None:
    """Unscaled gradients are those of float32, within the error of float16. A step with infinities
    is skipped."""
    data = batch("llava")
    wanted_model = build("llava")
    same_head(apply_pre(wanted_model))
    wanted_model(**data.inputs).loss.backward()
    wanted = gradients(wanted_model)

    for scale, skipped in ((2.0**8, False), (2.0**60, True)):
        model = build("llava")
        handle = apply_pre(model)
        same_head(handle)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        hook = handle.watch(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        before = handle.head.w1.detach().clone()
        with torch.autocast("cpu", torch.float16):
            loss = model(**data.inputs).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if not skipped:
            largest = max(float(g.norm()) for g in wanted.values() if g is not None)
            for name, gradient in gradients(model).items():
                # Gradients of the keys' biases are 0 except for rounding.
                if gradient is not None:
                    error = float((gradient - wanted[name]).norm())
                    assert error < 0.02 * float(wanted[name].norm()) + 1e-4 * largest, name
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, handle.head.w1) == skipped
        assert scaler.get_scale() == (scale / 2 if skipped else scale)
        metrics = handle.metrics()
        assert ("pre_head_grad_norm" in metrics) != skipped  # skipped: no step was taken
        if not skipped:
            norm = torch.nn.utils.get_total_norm(
                [g for n, g in wanted.items() if n.startswith("pre_head")]
            )
            assert metrics["pre_head_grad_norm"] == pytest.approx(float(norm), rel=0.02)
        hook.remove()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_the_norm_of_a_scaled_gradient(fused: bool, unscaled: bool) -> None:
    """A fused optimizer unscales inside its step, after the hook, unless the loop has done it
    before."""
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    handle.watch(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(**data.inputs).loss).backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in handle.head.parameters()])) / 1024
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert handle.metrics()["pre_head_grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_watching_an_optimizer_that_accelerate_prepared() -> None:
    model = build("llava")
    data = batch("llava")
    handle = apply_pre(model)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    hook = handle.watch(optimizer)
    accelerator.backward(prepared(**data.inputs).loss)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in handle.head.parameters()]))
    optimizer.step()
    assert handle.metrics()["pre_head_grad_norm"] == pytest.approx(norm)
    hook.remove()
    assert not optimizer.optimizer._optimizer_step_pre_hooks
