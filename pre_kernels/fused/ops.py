"""The operators that torch sees: loss and gradients, the scaling of gradients, and their
recomputation.

Registered, so that torch.compile, export and fake tensors take each for one opaque call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..checks import Options, Problem
from .sweep import Gradients, Selection, Steps, allocate, sweep

TENSORS = (
    "Tensor hidden, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor anchor, Tensor? rows, Tensor? weight, "
    "Tensor? normalizer"
)
OPTIONS = (
    "bool[] wanted, str impl, str loss, str activation, str reduction, ScalarType dtype, bool anchor_compact, "
    "bool weight_compact, float? divisor, int? workspace, SymInt? capacity, str? precision"
)
DTYPES = "SymInt total, ScalarType hidden, ScalarType w1, ScalarType b1, ScalarType w2, ScalarType b2, str impl"
FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"

LIBRARY = torch.library.Library("pre_kernels", "DEF")
LIBRARY.define(
    f"loss({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
LIBRARY.define(f"recompute(Tensor upstream, Tensor mean_divisor, {TENSORS}, {OPTIONS}) -> {FIVE}")
LIBRARY.define(
    "rescale(Tensor upstream, Tensor? place, Tensor dh, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, "
    f"{DTYPES}) -> {FIVE}"
)
# what has its gradient's shape and dtype already is scaled where it lies, and an empty tensor
# returned for it
LIBRARY.define(
    "rescale_(Tensor upstream, Tensor? place, Tensor(a!) dh, Tensor(b!) dw1, Tensor db1, Tensor(c!) dw2, Tensor db2, "
    f"{DTYPES}) -> {FIVE}"
)


@lru_cache
def steps_of(impl: str) -> type[Steps]:
    if impl == "triton":
        from .steps_triton import TritonSteps  # imports triton

        return TritonSteps
    if impl == "blas":
        from .steps_blas import BlasSteps

        return BlasSteps
    from .steps_torch import TorchSteps

    return TorchSteps


def _problem(tensors: Sequence[Any], options: Sequence[Any]) -> Problem:
    return Problem._make([*tensors, Options(*options)])


def _prepared(problem: Problem) -> Problem:
    """Contiguous weights and the dtypes that the steps count on; nothing is copied that is so
    already."""
    wide, device = problem.loss_dtype, problem.hidden.device
    weight, normalizer = problem.weight, problem.normalizer
    return problem._replace(
        weight=None if weight is None else weight.to(wide).contiguous(),
        normalizer=None
        if normalizer is None
        else normalizer.to(device, wide, non_blocking=device.type != "cpu"),
    )


def _select(steps: type[Steps], problem: Problem) -> Selection:
    checks.row_values(problem)
    selection = steps.select(problem)
    if selection.count is None:
        checks.selected_count(problem, selection.capacity)
    elif checks.debugging():
        checks.selected_count(problem, int(selection.count))
    return selection


def _outputs(like: Tensor, tensors: Any) -> tuple[Tensor, ...]:
    """An operator returns tensors: an empty one stands for None."""
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


def _given(tensor: Tensor) -> Tensor | None:
    return None if tensor.dim() == 1 and tensor.shape[0] == 0 else tensor


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    """loss, D, what `scatter` wants, dH, dW1, db1, dW2, db2: the gradients for an upstream gradient
    of 1."""
    tensors, (wanted, impl, *options) = arguments[:9], arguments[9:]
    problem, steps = _prepared(_problem(tensors, options)), steps_of(impl)
    selection = _select(steps, problem)
    losses = problem.hidden.new_empty(selection.capacity, dtype=problem.loss_dtype)
    divisor = steps.divisor(problem, selection)
    grads = sweep(steps, problem, selection, wanted, losses, divisor)
    loss = (
        losses if problem.options.reduction == "none" else steps.reduce(selection, losses, divisor)
    )
    return _outputs(problem.hidden, (loss, divisor, selection.place, *grads))


def _recompute(upstream: Tensor, mean_divisor: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, (wanted, impl, *options) = arguments[:9], arguments[9:]
    problem, steps = _prepared(_problem(tensors, options)), steps_of(impl)
    selection = steps.select(problem)
    upstream = upstream.contiguous()
    grads = sweep(steps, problem, selection, wanted, None, mean_divisor, upstream)
    dtypes = tuple(problem.hidden.dtype if x is None else x.dtype for x in tensors[1:5])
    return _five(
        steps, grads, selection.place, problem.hidden.shape[0], problem.hidden.dtype, dtypes, None
    )


def _rescale(
    upstream: Tensor, place: Tensor | None, *arguments: Any, in_place: bool = False
) -> tuple[Tensor, ...]:
    grads, (total, hidden, *dtypes, impl) = Gradients(*map(_given, arguments[:5])), arguments[5:]
    return _five(steps_of(impl), grads, place, total, hidden, tuple(dtypes), upstream, in_place)


def _rescale_in_place(
    upstream: Tensor, place: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    scaled = _rescale(upstream, place, *arguments, in_place=True)
    # an operator may not return what it was given
    return tuple(
        x.new_empty(0) if x is given else x for x, given in zip(scaled, arguments[:5], strict=True)
    )


def rescaled(
    upstream: Tensor, place: Tensor | None, grads: Sequence[Tensor], *rest: Any, in_place: bool
) -> tuple[Tensor, ...]:
    """The gradients of an upstream gradient of 1, scaled; `in_place`: in the memory of `grads`, as
    far as possible."""
    if not in_place:
        return torch.ops.pre_kernels.rescale(upstream, place, *grads, *rest)
    scaled = call("rescale_", upstream, place, *grads, *rest)
    return tuple(grad if _given(x) is None else x for x, grad in zip(scaled, grads, strict=True))


def _five(
    steps: type[Steps],
    grads: Gradients,
    place: Tensor | None,
    total: int,
    dtype: torch.dtype,
    dtypes: tuple[torch.dtype, ...],
    upstream: Tensor | None,
    in_place: bool = False,
) -> tuple[Tensor, ...]:
    dh = (
        None
        if grads.hidden is None
        else steps.scatter(grads.hidden, place, total, dtype, upstream, in_place)
    )
    like = next(x for x in grads if x is not None)
    return _outputs(like, (dh, *steps.scale(grads, dtypes, upstream, in_place)))


def _fake_loss(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (wanted, impl, *options) = arguments[:9], arguments[9:]
    problem, steps = _problem(tensors, options), steps_of(impl)
    layout = steps.layout(problem)
    capacity: Any = problem.bound
    shapes_something = layout.spread or wanted[0] or problem.options.reduction == "none"
    if problem.masked and (impl == "torch" or problem.count_on_host) and shapes_something:
        capacity = torch.library.get_ctx().new_dynamic_size()
    new, wide = problem.hidden.new_empty, problem.loss_dtype
    grads = allocate(problem, layout, capacity, wanted)
    if problem.rows is None:
        place = new(0)
    else:
        place = (
            new(capacity, dtype=torch.int64)
            if layout.spread
            else new(problem.hidden.shape[0], dtype=torch.int32)
        )
    shape = (capacity,) if problem.options.reduction == "none" else ()
    return _outputs(problem.hidden, (new(shape, dtype=wide), new((), dtype=wide), place, *grads))


def _fake_recompute(upstream: Tensor, mean_divisor: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, wanted = arguments[:5], arguments[9]
    return tuple(
        x.new_empty(x.shape) if want and x is not None else tensors[0].new_empty(0)
        for x, want in zip(tensors, wanted, strict=True)
    )


def _fake_rescale(upstream: Tensor, place: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    grads, (total, *dtypes, _) = arguments[:5], arguments[5:]
    shapes = [
        (total, grads[0].shape[-1]),
        grads[1].shape,
        grads[2].shape[1:],
        grads[3].shape,
        grads[4].shape[1:],
    ]
    return tuple(
        x.new_empty(0 if _given(x) is None else shape, dtype=dtype)
        for x, shape, dtype in zip(grads, shapes, dtypes, strict=True)
    )


def _fake_rescale_in_place(
    upstream: Tensor, place: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    fresh = _fake_rescale(upstream, place, *arguments)
    lies = [place is None or arguments[-1] == "torch", True, False, True, False]
    return tuple(
        x.new_empty(0) if stays and x.dtype == given.dtype else x
        for x, given, stays in zip(fresh, arguments[:5], lies, strict=True)
    )


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "loss": (_loss, _fake_loss),
    "recompute": (_recompute, _fake_recompute),
    "rescale": (_rescale, _fake_rescale),
    "rescale_": (_rescale_in_place, _fake_rescale_in_place),
}


# no tensors of somebody's own kind, and no symbols
PLAIN = {Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str, list}


def call(name: str, *arguments: Any) -> tuple[Tensor, ...]:
    """An operator, without grad mode; the function behind it where no mode, profiler or tensor of
    its own kind sees operators: a small call on a CPU spends a tenth of its time in the
    dispatcher."""
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
        or not PLAIN.issuperset(map(type, arguments))
    )
    return (getattr(torch.ops.pre_kernels, name) if watched else OPERATORS[name][0])(*arguments)


def _constant(real: Callable[..., Any]) -> Callable[..., Any]:
    """Without grad mode, which an exported program's call may have on, with parameters that require
    grad. It is off in `autograd.Function`, where turning it off again would take the host as long
    as a launch."""

    def call(*arguments: Any) -> Any:
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            return real(*arguments)

    return call


for name, (real, fake) in OPERATORS.items():
    LIBRARY.impl(name, _constant(real), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pre_kernels::{name}", fake, lib=LIBRARY)
