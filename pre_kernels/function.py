"""The autograd.Function: what is computed when, what is saved, and the loop over chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import checks
from .checks import Problem


@dataclass(frozen=True)
class Selection:
    """Which rows of hidden take part. `count` is the device's own N where the host must not wait for it."""

    index: Tensor | None  # (capacity,) flat rows; None = every row in order
    inverse: Tensor | None  # (R,) position of a row in `index`, or -1; None where the implementation has no use for it
    count: Tensor | None  # 0-d int32; None = all `capacity` positions are live
    capacity: int


class Wanted(NamedTuple):
    """Which gradients are wanted: what is frozen is not computed."""

    hidden: bool
    w1: bool
    b1: bool
    w2: bool
    b2: bool


class Steps(Protocol):
    """What an implementation provides. An instance is one sweep: its workspace, and the operations on a chunk of rows
    [start, stop) of the selection, called in the order in which they stand here."""

    chunk: int  # rows of a chunk

    @staticmethod
    def select(problem: Problem) -> Selection: ...

    def __init__(self, problem: Problem, selection: Selection, wanted: Wanted) -> None: ...

    def project(self, start: int, stop: int) -> None:
        """Z = H·W1ᵀ + b1 and G = act(Z)."""

    def row_loss(self, start: int, stop: int, coefficient: Tensor | None, losses: Tensor) -> None:
        """P = G·W2ᵀ + b2; losses[start:stop] = coefficient · ℓ; dP = coefficient · dℓ/dP if any gradient is wanted."""

    def output_grads(self, dw2: Tensor | None, db2: Tensor | None) -> None:
        """dW2 += dPᵀ·G and db2 += Σ dP."""

    def backproject(self) -> None:
        """dZ = (dP·W2) ⊙ act'(Z)."""

    def input_grads(self, start: int, stop: int, dh: Tensor | None, dw1: Tensor | None, db1: Tensor | None) -> None:
        """dW1 += dZᵀ·H, db1 += Σ dZ and dh[start:stop] = dZ·W1."""

    @staticmethod
    def scatter(dh: Tensor, selection: Selection, total: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """scale · dh (capacity, d) as (total, d) in `dtype`, zero where a row is not selected; never in place."""
        ...

    @staticmethod
    def scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """scale · grad in `dtype`; never in place."""
        ...


def _sweep(
    problem: Problem, steps: type[Steps], selection: Selection, wanted: Wanted, coefficient: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """One pass over the selected rows: (capacity,) losses, and dh, dw1, db1, dw2, db2 summed over the chunks."""
    new = problem.hidden.new_empty
    capacity, wide = selection.capacity, problem.loss_dtype
    losses = new(capacity, dtype=wide).zero_()
    dh = new(capacity, problem.hidden.shape[1], dtype=problem.dtype) if wanted.hidden else None
    # weight gradients are summed over chunks in float32: in bfloat16 every chunk would round the sum again
    dw1, db1, dw2, db2 = (
        new(parameter.shape, dtype=wide).zero_() if want and parameter is not None else None
        for parameter, want in zip((problem.w1, problem.b1, problem.w2, problem.b2), wanted[1:], strict=True)
    )
    with torch.autocast(problem.hidden.device.type, enabled=False):  # its dtype is problem.dtype by now
        run = steps(problem, selection, wanted)
        for start in range(0, capacity, run.chunk):
            stop = min(start + run.chunk, capacity)
            run.project(start, stop)
            run.row_loss(start, stop, coefficient, losses)
            if wanted.w2 or wanted.b2:
                run.output_grads(dw2, db2)
            if wanted.hidden or wanted.w1 or wanted.b1:
                run.backproject()
                run.input_grads(start, stop, dh, dw1, db1)
    return losses, [dh, dw1, db1, dw2, db2]


def _weight(problem: Problem, selection: Selection) -> Tensor | None:
    """(capacity,) row weights in selection order, zero beyond the count."""
    weight = problem.weight
    if weight is None:
        return None
    weight = weight.to(problem.loss_dtype)
    if not problem.weight_compact and selection.index is not None:
        weight = weight[selection.index]
    if selection.count is not None:
        live = torch.arange(selection.capacity, device=weight.device) < selection.count
        weight = weight.where(live, 0)
    return weight


def _constant(tensor: Tensor | None) -> Tensor | None:
    """As it is, or a copy that autograd can save: anchors may come from an encoder under inference mode."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _divisor(problem: Problem, selection: Selection, weight: Tensor | None) -> Tensor:
    """The D of a mean as a 0-d tensor: 1 if N = 0 (an empty batch is 0, not nan), nan if D = 0 otherwise."""
    wide, device = problem.loss_dtype, problem.hidden.device
    if selection.count is None:
        count = torch.full((), selection.capacity, dtype=wide, device=device)
    else:
        count = selection.count.to(wide)
    if isinstance(problem.normalizer, Tensor):
        divisor = problem.normalizer.to(device, wide, non_blocking=True)
    elif problem.normalizer is not None:
        divisor = torch.full((), problem.normalizer, dtype=wide, device=device)
    elif weight is not None:
        divisor = weight.sum()
    else:
        divisor = count
    return torch.where(count == 0, 1.0, torch.where(divisor == 0, torch.nan, divisor))


class _PreLoss(torch.autograd.Function):
    """Costs, for N rows of widths d → m → z: 6·N·m·(d+z) FLOP with all gradients wanted, in forward.

    Saved: dH (N, d) in the products' dtype and the float32 sums of dW1, db1, dW2, db2; no activation. The backward is
    a scale each. Where the upstream gradient has to be known before rounding (one per row for "none"; GradScaler's
    factor in float16, where elements near 1/(N·|p|) would vanish) only the inputs are saved, and the backward repeats
    the two projections: 8 GEMMs instead of 6.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        problem: Problem,
        steps: type[Steps],
        selection: Selection,
        grad_enabled: bool,
    ) -> Tensor:
        nothing = Wanted(False, False, False, False, False)
        wanted = Wanted(*ctx.needs_input_grad[:5]) if grad_enabled else nothing
        recompute = problem.reduction == "none" or problem.dtype == torch.float16
        weight = _weight(problem, selection)
        divisor = _divisor(problem, selection, weight) if problem.reduction == "mean" else None
        losses, grads = _sweep(problem, steps, selection, nothing if recompute else wanted, weight)

        if any(wanted):
            ctx.steps, ctx.selection, ctx.total = steps, selection, hidden.shape[0]
            ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, w1, b1, w2, b2)]
            ctx.recompute = (problem.without_tensors(), wanted) if recompute else None
            saved = [hidden, w1, b1, w2, b2, _constant(problem.anchor), _constant(weight)] if recompute else grads
            ctx.save_for_backward(*saved, divisor)
        if problem.reduction == "none":
            return losses
        return losses.sum() if divisor is None else losses.sum() / divisor

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _PreLoss._gradients(ctx, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            grads = tuple(
                None if grad is None else _Once.apply(grad, torch.ones((), requires_grad=True)) for grad in grads
            )
        return (*grads, None, None, None, None)

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Of hidden, w1, b1, w2 and b2."""
        *saved, divisor = ctx.saved_tensors
        scale = upstream if divisor is None else upstream / divisor
        if ctx.recompute is None:
            dh, *grads = saved
        else:
            problem, wanted = ctx.recompute
            *inputs, anchor, weight = saved
            hidden, w1, b1, w2, b2 = inputs
            problem = replace(problem, hidden=hidden, w1=w1, b1=b1, w2=w2, b2=b2, anchor=anchor)
            coefficient = scale if weight is None else scale * weight
            coefficient = coefficient.expand(ctx.selection.capacity).contiguous()
            _, (dh, *grads) = _sweep(problem, ctx.steps, ctx.selection, wanted, coefficient)
            scale = None

        hidden_dtype, *dtypes = ctx.dtypes
        return (
            None if dh is None else ctx.steps.scatter(dh, ctx.selection, ctx.total, scale, hidden_dtype),
            *(
                None if grad is None else ctx.steps.scaled(grad, scale, dtype)
                for grad, dtype in zip(grads, dtypes, strict=True)
            ),
        )


class _Once(torch.autograd.Function):
    """A gradient that raises when it is differentiated. PyTorch's `once_differentiable` lets it pass as a constant
    where the upstream gradient is one, and a penalty on the gradient would silently do nothing."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, token: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("fused_pre_loss: its gradient was differentiated; it is once-differentiable")


def pre_loss(problem: Problem, steps: type[Steps]) -> Tensor:
    """The loss of a checked problem, computed by `steps`."""
    selection = steps.select(problem)
    if selection.count is None:
        checks.selected_count(problem, selection.capacity)
    return _PreLoss.apply(
        problem.hidden,
        problem.w1,
        problem.b1,
        problem.w2,
        problem.b2,
        problem,
        steps,
        selection,
        torch.is_grad_enabled(),  # inside forward grad mode is always off, and needs_input_grad stays True
    )
