"""The autograd.Function: what is computed when, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..problem import Options, Problem
from . import ops

INSTEAD = "reference.pre_loss, the equations in plain PyTorch, does"


def recomputes(options: Options) -> bool:
    """Whether the backward has to know the upstream gradient before it rounds: one per row for
    "none"; in float16 GradScaler's factor, without which elements near 1/(N·|p|) would vanish."""
    return options.reduction == "none" or options.dtype == torch.float16


class _PreLoss(torch.autograd.Function):
    """Costs, for N rows of widths d → m → z: 6·N·m·(d+z) FLOP with all gradients wanted, in
    forward.

    Saved: dH (N, d) in the products' dtype and the sums of dW1, db1, dW2, db2, for an upstream
    gradient of 1; no activation. With "torch" dH lies as hidden does, zero elsewhere: new memory
    costs a CPU more than a pass over it. The backward scales them in one pass, where they lie if
    the graph is not retained. Where it recomputes (see `recomputes`) only the inputs are saved, and
    the backward repeats the two projections: 8 GEMMs instead of 6.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        anchor: Tensor,
        rows: Tensor | None,
        weight: Tensor | None,
        normalizer: Tensor | None,
        options: tuple[Any, ...],
        impl: str,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        tensors = (hidden, w1, b1, w2, b2, anchor, rows, weight, normalizer)
        wanted = list(ctx.needs_input_grad[:5]) if grad_enabled else [False] * 5
        recompute = recomputes(Options(*options))
        token = hidden.new_empty(0)  # an output, by which `_Once` reaches this node of the graph
        loss, divisor, scatter_map, dh, *sums = ops.call(
            "loss", *tensors, [False] * 5 if recompute else wanted, impl, *options
        )
        if any(wanted):
            ctx.options = options
            ctx.impl = impl
            ctx.wanted = wanted
            ctx.recompute = recompute
            ctx.dtypes = [hidden.dtype if x is None else x.dtype for x in tensors[:5]]
            ctx.total = hidden.shape[0]
            ctx.all_rows = rows is None
            if recompute:
                # The rows are copied: the caller may reuse the tensor before the backward.
                rows = None if rows is None else rows.clone()
                ctx.save_for_backward(
                    *tensors[:5], _constant(anchor), rows, _constant(weight), divisor, token
                )
            else:
                ctx.save_for_backward(scatter_map, dh, *sums, token)
        # dH and the scatter map are outputs because under torch.compile their first size may depend
        # on data, and such a size must not stay hidden in ctx.
        ctx.mark_non_differentiable(dh, scatter_map)
        # Otherwise autograd would make zeros of dH's size, as the gradient of that output.
        ctx.set_materialize_grads(False)
        return loss, dh, scatter_map, token

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 12
        with torch.no_grad():
            if ctx.recompute:
                *tensors, divisor, token = ctx.saved_tensors
                grads = torch.ops.pre_kernels.recompute(
                    upstream, divisor, *tensors, None, ctx.wanted, ctx.impl, *ctx.options
                )
            else:
                scatter_map, *sums, token = ctx.saved_tensors
                scatter_map = None if ctx.all_rows else scatter_map
                grads = ops.rescaled(
                    upstream,
                    scatter_map,
                    sums,
                    ctx.total,
                    *ctx.dtypes,
                    ctx.impl,
                    in_place=_donated(upstream),
                )
        grads = [grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True
            once: Callable[..., Tensor] = _Once.apply
            grads = [None if grad is None else once(grad, upstream, token) for grad in grads]
        return (*grads, *(None,) * 7)


def _constant(tensor: Tensor | None) -> Tensor | None:
    """As it is, or a copy that autograd can save: anchors may come from an encoder under inference
    mode."""
    # A compiler cannot ask whether a tensor is of inference mode, and need not.
    if tensor is None or torch.compiler.is_compiling():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def _donated(upstream: Tensor) -> bool:
    """Whether this backward may scale the saved gradients where they lie, as nobody will ask for
    them again."""
    if torch.compiler.is_compiling():
        return False
    # Under `is_grads_batched`, or `torch.func.vmap` around `autograd.grad`, one backward returns
    # several gradients, and the memory holds one.
    functorch = torch._C._functorch
    if functorch.is_legacy_batchedtensor(upstream) or functorch.is_batchedtensor(upstream):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _dual(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


class _Once(torch.autograd.Function):
    """A gradient that raises when it is differentiated, by the inputs (which the token leads to) or
    by the upstream gradient. PyTorch's `once_differentiable` lets it pass as a constant where the
    upstream gradient is one, and a penalty on the gradient would silently do nothing; so would one
    hung on a leaf of its own, in `autograd.grad` by the inputs."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, upstream: Tensor, token: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"fused_pre_loss: its gradient was differentiated; it is once-differentiable; {INSTEAD}"
        )


def pre_loss(problem: Problem, impl: str) -> Tensor:
    """The loss of a checked problem, computed by `impl`."""
    # torch.compile would take these questions, or a `jvp` that raises, for a graph break.
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"fused_pre_loss: does not run under a transform of torch.func; {INSTEAD}"
            )
        if forward_ad._current_level >= 0 and any(_dual(tensor) for tensor in problem[:5]):
            raise NotImplementedError(f"fused_pre_loss: has no forward-mode derivative; {INSTEAD}")
    # Grad mode is passed on because inside `forward` it is always off, and needs_input_grad says
    # nothing of it.
    apply: Callable[..., tuple[Tensor, ...]] = _PreLoss.apply
    loss, *_ = apply(*problem[:9], tuple(problem.options), impl, torch.is_grad_enabled())
    return loss
