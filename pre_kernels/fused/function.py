"""The autograd.Function: it decides what forward and backward compute, and what is saved between
them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._ops import ops as operators
from ..problem import DIFFERENTIABLE, Options, Problem
from . import ops

INSTEAD = "use reference.pre_loss, the equations in plain PyTorch"


def recomputes(options: Options) -> bool:
    """Whether the backward has to know the upstream gradient before it rounds.

    With "none" there is one upstream gradient per row. In float16 it carries GradScaler's factor,
    without which elements near 1/(N·|p|) would underflow.
    """
    return options.reduction == "none" or options.dtype == torch.float16


class _PreLoss(torch.autograd.Function):
    """The loss as a node of autograd's graph. The forward already computes the gradients.

    With all gradients wanted it costs 6·N·m·(d+z) FLOP for N rows of widths d → m → z.

    It saves dH (N, d) in the products' dtype and the sums of dW1, db1, dW2, ..., all for an
    upstream gradient of 1, and no activation. With a norm, dH is still that of the normalised rows:
    the backward reads hidden once more, and makes the gradients of scale and shift too. With
    "torch" dH has the shape of hidden and is zero in other rows, because new memory costs a CPU
    more than a pass over it. The backward scales the gradients in one pass, in place unless the
    graph is retained. Where it recomputes (see `recomputes`) only the inputs are saved, and the
    backward repeats the two projections: 8 GEMMs instead of 6.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Compute the loss from the fields of a `Problem`, the options as a tuple, the name of the
        implementation, and whether grad mode is on."""
        *tensors, options, impl, grad_enabled = arguments
        problem = Problem._make([*tensors, Options(*options)])
        hidden = problem.hidden
        rows = problem.rows
        nothing = [False] * DIFFERENTIABLE
        wanted = list(ctx.needs_input_grad[:DIFFERENTIABLE]) if grad_enabled else nothing
        recompute = recomputes(problem.options)
        # `_Once` reaches this node of the graph by this output.
        token = hidden.new_empty(0)
        loss, divisor, scatter_map, dh, *sums = ops.call(
            "loss", *tensors, nothing if recompute else wanted, impl, *options
        )
        if any(wanted):
            ctx.options = options
            ctx.impl = impl
            ctx.wanted = wanted
            ctx.recompute = recompute
            ctx.dtypes = [hidden.dtype if x is None else x.dtype for x in tensors[:DIFFERENTIABLE]]
            ctx.total = hidden.shape[0] if wanted[0] else None
            ctx.all_rows = rows is None
            if recompute:
                # The caller may change the rows before the backward, so they are copied.
                rows = None if rows is None else rows.clone()
                ctx.save_for_backward(
                    *[_constant(x) for x in tensors[:DIFFERENTIABLE]],
                    _constant(problem.anchor),
                    rows,
                    _constant(problem.weight),
                    _constant(problem.images),
                    divisor,
                    token,
                )
            else:
                # The torch steps have passed dH through the norm already.
                normed = problem.options.norm is not None and impl != "torch" and dh.dim() == 2
                norm: tuple[Tensor | None, ...] = (None, None)
                if normed:
                    norm = (_constant(hidden), _constant(problem.norm_weight))
                ctx.save_for_backward(scatter_map, *norm, dh, *sums, token)
        # dH and the scatter map are outputs: under torch.compile their first size may depend on
        # data, and such a size must not stay hidden in ctx.
        ctx.mark_non_differentiable(dh, scatter_map)
        # By default autograd would make zeros of dH's size, as the gradient of that output.
        ctx.set_materialize_grads(False)
        return loss, dh, scatter_map, token

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.no_grad():
            if ctx.recompute:
                *tensors, divisor, token = ctx.saved_tensors
                grads = operators.recompute(
                    upstream, divisor, *tensors, None, ctx.wanted, ctx.impl, *ctx.options
                )
            else:
                scatter_map, hidden, norm_weight, *sums, token = ctx.saved_tensors
                scatter_map = None if ctx.all_rows else scatter_map
                options = Options(*ctx.options)
                grads = ops.rescaled(
                    upstream,
                    scatter_map,
                    sums,
                    ctx.total,
                    *ctx.dtypes,
                    ctx.impl,
                    hidden,
                    norm_weight,
                    options.norm,
                    options.norm_eps,
                    in_place=_donated(upstream),
                )
        grads = [grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True)]
        if torch.is_grad_enabled():  # The caller asked for create_graph=True.
            once: Callable[..., Tensor] = _Once.apply
            grads = [None if grad is None else once(grad, upstream, token) for grad in grads]
        return (*grads, *(None,) * (len(ctx.needs_input_grad) - DIFFERENTIABLE))


def _constant(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, or a copy where autograd cannot save it: an anchor, or hidden states that
    are not trained, may come from a model that runs in inference mode."""
    # While torch.compile traces, `is_inference` cannot be asked, and the copy is not needed.
    if tensor is None or torch.compiler.is_compiling():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def _donated(upstream: Tensor) -> bool:
    """Whether this backward may scale the saved gradients in place, because nobody will read them
    again."""
    if torch.compiler.is_compiling():
        return False
    # Under `is_grads_batched`, or `torch.func.vmap` around `autograd.grad`, one backward returns
    # several gradients, and the saved memory has room for one.
    functorch = torch._C._functorch
    if functorch.is_legacy_batchedtensor(upstream) or functorch.is_batchedtensor(upstream):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _dual(tensor: Any) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


class _Once(torch.autograd.Function):
    """Pass a gradient on, and raise when it is differentiated by an input or by the upstream
    gradient.

    The token leads autograd to the inputs. PyTorch's `once_differentiable` is not enough: where the
    upstream gradient is a constant it lets the gradient pass as a constant too, and a penalty on
    the gradient would silently do nothing. A node on a leaf of its own would have the same gap in
    `autograd.grad` by the inputs.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, upstream: Tensor, token: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "fused_pre_loss: its gradient was differentiated, but it is once-differentiable; "
            f"{INSTEAD}"
        )


def pre_loss(problem: Problem, impl: str) -> Tensor:
    """Compute the loss of a checked problem with `impl`."""
    # While torch.compile traces, these questions would break the graph, as would a `jvp` that
    # raises.
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"fused_pre_loss: does not run under a transform of torch.func; {INSTEAD}"
            )
        if forward_ad._current_level >= 0 and any(map(_dual, problem[:DIFFERENTIABLE])):
            raise NotImplementedError(f"fused_pre_loss: has no forward-mode derivative; {INSTEAD}")
    # Grad mode is an argument because inside `forward` it is always off, and needs_input_grad does
    # not show it.
    apply: Callable[..., tuple[Tensor, ...]] = _PreLoss.apply
    loss, *_ = apply(*problem[:-1], tuple(problem.options), impl, torch.is_grad_enabled())
    return loss
