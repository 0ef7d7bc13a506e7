"""The operators that torch sees: loss with gradients, the scaling of gradients, and recomputation.

They are registered, so torch.compile, export and fake tensors treat each as one opaque call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import device_checks
from .._ops import add_op_namespace_prefix
from .._ops import ops as operators
from ..checks import debugging
from ..problem import COLUMN_SUMS, DIFFERENTIABLE, Options, Problem
from .sweep import Finish, Gradients, Selection, Steps, allocate, sweep

OLDEST_TORCH = (2, 9)
# These are the parts of the operators' schemas.
TENSORS = (
    "Tensor hidden, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? w3, Tensor? b3, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor anchor, Tensor? rows, Tensor? weight, "
    "Tensor? images, Tensor? normalizer"
)
INPUTS = len(Problem._fields) - 1  # the tensors in front of the options
OPTIONS = (
    "bool[] wanted, str impl, str loss, str activation, str reduction, ScalarType dtype, "
    "bool anchor_compact, bool weight_compact, bool images_compact, float? divisor, "
    "int? workspace, SymInt? capacity, str? precision, str? norm, float norm_eps"
)
DTYPES = (
    "SymInt? total, ScalarType hidden_dtype, ScalarType w1, ScalarType b1, ScalarType w2, "
    "ScalarType b2, ScalarType w3, ScalarType b3, ScalarType norm_weight_dtype, "
    "ScalarType norm_bias, str impl, Tensor? hidden, Tensor? norm_weight, str? norm, float norm_eps"
)
GRADIENTS = ", ".join(["Tensor"] * DIFFERENTIABLE)


def _library() -> torch.library.Library:
    namespace = add_op_namespace_prefix("").rstrip(":")
    # Development builds of 2.9 have its operators: only the numbers count.
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"torch: got {torch.__version__}, want {oldest} or newer")
    try:
        return torch.library.Library(namespace, "DEF")
    except RuntimeError as error:
        others = [
            getattr(module, "__file__", None)
            for name, module in sys.modules.items()
            if name.endswith(".fused.ops")
            and getattr(getattr(module, "LIBRARY", None), "ns", None) == namespace
        ]
        raise ImportError(
            f"pre_kernels: got a second copy, {__file__}, in a process in which "
            f"{' and '.join(map(str, others)) or 'an earlier import'} has registered the operators "
            f"torch.ops.{namespace}; want one copy on sys.path, and a new process after an upgrade "
            "(builds for the Kernel Hub have namespaces of their own)"
        ) from error


LIBRARY = _library()
LIBRARY.define(f"loss({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, {GRADIENTS})")
LIBRARY.define(
    f"recompute(Tensor upstream, Tensor mean_divisor, {TENSORS}, {OPTIONS}) -> ({GRADIENTS})"
)
# The schema says `place` for the scatter map, because exported programs use this name.
LIBRARY.define(
    "rescale(Tensor upstream, Tensor? place, Tensor dh, Tensor dw1, Tensor db1, Tensor dw2, "
    "Tensor db2, Tensor dw3, Tensor db3, Tensor dnorm_weight, Tensor dnorm_bias, "
    f"{DTYPES}) -> ({GRADIENTS})"
)
# This operator scales a gradient in place if it has its final shape and dtype already, and returns
# an empty tensor for it.
LIBRARY.define(
    "rescale_(Tensor upstream, Tensor? place, Tensor(a!) dh, Tensor(b!) dw1, Tensor db1, "
    "Tensor(c!) dw2, Tensor db2, Tensor(d!) dw3, Tensor db3, Tensor dnorm_weight, "
    f"Tensor dnorm_bias, {DTYPES}) -> ({GRADIENTS})"
)


@lru_cache
def steps_of(impl: str) -> type[Steps]:
    if impl == "triton":
        # This import needs triton, so it waits until an implementation needs it.
        from .steps_triton import TritonSteps

        return TritonSteps
    if impl == "blas":
        from .steps_blas import BlasSteps

        return BlasSteps
    from .steps_torch import TorchSteps

    return TorchSteps


def _problem(tensors: Sequence[Any], options: Sequence[Any]) -> Problem:
    return Problem._make([*tensors, Options(*options)])


def _prepared(problem: Problem) -> Problem:
    """Return the problem with contiguous row weights, in the dtypes that the steps expect. A tensor
    that already fits is not copied."""
    accum_dtype = problem.loss_dtype
    device = problem.hidden.device
    weight = problem.weight
    normalizer = problem.normalizer
    return problem._replace(
        weight=None if weight is None else weight.to(accum_dtype).contiguous(),
        normalizer=None
        if normalizer is None
        else normalizer.to(device, accum_dtype, non_blocking=device.type != "cpu"),
    )


def _select(steps: type[Steps], problem: Problem) -> Selection:
    device_checks.row_values(problem)
    selection = steps.select(problem)
    if selection.count is None:
        device_checks.selected_count(problem, selection.capacity)
    elif debugging():
        device_checks.selected_count(problem, int(selection.count))
    return _with_images(problem, selection)


def _with_images(problem: Problem, selection: Selection) -> Selection:
    """Add the images of a Gram loss to the selection."""
    if problem.options.loss != "gram":
        return selection
    numbers = problem.images
    if numbers is None:
        return replace(selection, images=[selection.capacity] * (selection.capacity > 0))
    if not problem.options.images_compact and selection.index is not None:
        numbers = numbers.to(selection.index.device)[selection.index]
    return replace(selection, images=device_checks.image_sizes(numbers))


def _empty_if_none(like: Tensor, tensors: Any) -> tuple[Tensor, ...]:
    """Replace None by an empty tensor, since an operator cannot return None."""
    return (*[like.new_empty(0) if x is None else x for x in tensors],)


def _none_if_empty(tensor: Tensor) -> Tensor | None:
    """Reverse `_empty_if_none`."""
    return None if tensor.dim() == 1 and tensor.shape[0] == 0 else tensor


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    """Return loss, D, the scatter map and the `Gradients` of an upstream gradient of 1."""
    tensors, (wanted, impl, *options) = arguments[:INPUTS], arguments[INPUTS:]
    problem = _prepared(_problem(tensors, options))
    steps = steps_of(impl)
    selection = _select(steps, problem)
    losses = problem.hidden.new_empty(selection.capacity, dtype=problem.loss_dtype)
    divisor = steps.divisor(problem, selection)
    grads = sweep(steps, problem, selection, wanted, losses, divisor)
    loss = (
        losses if problem.options.reduction == "none" else steps.reduce(selection, losses, divisor)
    )
    return _empty_if_none(problem.hidden, (loss, divisor, selection.scatter_map, *grads))


def _recompute(upstream: Tensor, mean_divisor: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients for `upstream`, by another pass over the rows."""
    tensors, (wanted, impl, *options) = arguments[:INPUTS], arguments[INPUTS:]
    problem = _prepared(_problem(tensors, options))
    steps = steps_of(impl)
    selection = _with_images(problem, steps.select(problem))
    upstream = upstream.contiguous()
    grads = sweep(steps, problem, selection, wanted, None, mean_divisor, upstream)
    hidden = problem.hidden
    dtypes = [hidden.dtype if x is None else x.dtype for x in tensors[:DIFFERENTIABLE]]
    total = hidden.shape[0] if wanted[0] else None
    norm = (hidden, problem.norm_weight, problem.options.norm, problem.options.norm_eps)
    finish = Finish(selection.scatter_map, total, dtypes, None, False, *norm)
    return _finish(steps, grads, finish)


def _rescale(
    upstream: Tensor,
    scatter_map: Tensor | None,
    *arguments: Any,
    in_place: bool = False,
) -> tuple[Tensor, ...]:
    grads = Gradients(*map(_none_if_empty, arguments[:DIFFERENTIABLE]))
    total, *dtypes, impl, hidden, weight, norm, eps = arguments[DIFFERENTIABLE:]
    finish = Finish(scatter_map, total, dtypes, upstream, in_place, hidden, weight, norm, eps)
    return _finish(steps_of(impl), grads, finish)


def _rescale_in_place(*arguments: Any) -> tuple[Tensor, ...]:
    scaled = _rescale(*arguments, in_place=True)
    # An operator may not return one of its arguments.
    pairs = zip(scaled, arguments[2 : 2 + DIFFERENTIABLE], strict=True)
    return (*[x.new_empty(0) if x is grad else x for x, grad in pairs],)


def rescaled(
    upstream: Tensor,
    scatter_map: Tensor | None,
    grads: Sequence[Tensor],
    *rest: Any,
    in_place: bool,
) -> tuple[Tensor, ...]:
    """Return `upstream` times `grads`, which belong to an upstream gradient of 1. With a norm, dH
    passes it on the way. With `in_place` reuse their memory as far as possible."""
    arguments = (upstream, scatter_map, *grads, *rest)
    if not in_place:
        fresh: tuple[Tensor, ...] = operators.rescale(*arguments)
        return fresh
    scaled = call("rescale_", *arguments)
    pairs = zip(scaled, grads, strict=True)
    return (*[grad if _none_if_empty(x) is None else x for x, grad in pairs],)


def _finish(steps: type[Steps], grads: Gradients, finish: Finish) -> tuple[Tensor, ...]:
    """Return the gradients in the inputs' shapes and dtypes."""
    dh = None
    if grads.hidden is not None:
        dh, grads = steps.scatter(grads, finish)
    like = next(x for x in grads if x is not None)
    scaled = (dh, *steps.scale(grads, finish))
    pairs = zip(scaled, finish.dtypes, strict=True)
    return (*[like.new_empty(0, dtype=dtype) if x is None else x for x, dtype in pairs],)


def _fake_loss(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (wanted, impl, *options) = arguments[:INPUTS], arguments[INPUTS:]
    problem = _problem(tensors, options)
    steps = steps_of(impl)
    layout = steps.layout(problem)
    capacity: Any = problem.bound
    wants_dh = True in (wanted[0], *wanted[7:])
    shapes_something = layout.spread or wants_dh or problem.options.reduction == "none"
    if problem.masked and (impl == "torch" or problem.count_on_host) and shapes_something:
        capacity = torch.library.get_ctx().new_dynamic_size()
    new = problem.hidden.new_empty
    accum_dtype = problem.loss_dtype
    grads = allocate(problem, layout, capacity, wanted)
    if problem.rows is None:
        scatter_map = new(0)
    elif layout.spread:  # The torch steps return the index itself.
        scatter_map = new(capacity, dtype=torch.int64)
    else:  # The Triton steps return the inverse of the index.
        scatter_map = new(problem.hidden.shape[0], dtype=torch.int32)
    shape = (capacity,) if problem.options.reduction == "none" else ()
    loss, divisor = new(shape, dtype=accum_dtype), new((), dtype=accum_dtype)
    return _empty_if_none(problem.hidden, (loss, divisor, scatter_map, *grads))


def _fake_recompute(upstream: Tensor, mean_divisor: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, wanted = arguments[:DIFFERENTIABLE], arguments[INPUTS]
    return tuple(
        x.new_empty(x.shape) if want and x is not None else tensors[0].new_empty(0)
        for x, want in zip(tensors, wanted, strict=True)
    )


def _fake_rescale(
    upstream: Tensor, scatter_map: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    grads = arguments[:DIFFERENTIABLE]
    total, *dtypes, _impl, _hidden, _weight, _norm, _eps = arguments[DIFFERENTIABLE:]
    shapes = [0 if total is None else (total, grads[0].shape[-1])]
    # The rows of column sums are partial sums.
    shapes += [x.shape[1:] if i in COLUMN_SUMS else x.shape for i, x in enumerate(grads)][1:]
    return tuple(
        x.new_empty(0 if _none_if_empty(x) is None else shape, dtype=dtype)
        for x, shape, dtype in zip(grads, shapes, dtypes, strict=True)
    )


def _fake_rescale_in_place(*arguments: Any) -> tuple[Tensor, ...]:
    fresh = _fake_rescale(*arguments)
    grads = arguments[2 : 2 + DIFFERENTIABLE]
    dh_stays = arguments[1] is None or arguments[-5] == "torch"
    stays = [i not in COLUMN_SUMS if i else dh_stays for i in range(DIFFERENTIABLE)]
    return tuple(
        x.new_empty(0) if stay and x.dtype == grad.dtype else x
        for x, grad, stay in zip(fresh, grads, stays, strict=True)
    )


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "loss": (_loss, _fake_loss),
    "recompute": (_recompute, _fake_recompute),
    "rescale": (_rescale, _fake_rescale),
    "rescale_": (_rescale_in_place, _fake_rescale_in_place),
}


# The dispatcher does nothing about arguments of these types: subclasses of Tensor and symbols are
# not among them.
PLAIN = {Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str, list}


def call(name: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Call an operator with grad mode off.

    Where no mode, profiler or subclass of Tensor watches operators, this calls the function behind
    the operator directly: a small call on a CPU spends a tenth of its time in the dispatcher.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
        or not PLAIN.issuperset(map(type, arguments))
    )
    function = getattr(operators, name) if watched else OPERATORS[name][0]
    outputs: tuple[Tensor, ...] = function(*arguments)
    return outputs


def _constant(real: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `real` so that it runs with grad mode off: an exported program may call it with grad
    mode on and parameters that require grad.

    Inside `autograd.Function` grad mode is off already, and switching it off again would cost the
    host as much as a launch.
    """

    def call(*arguments: Any) -> Any:
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            return real(*arguments)

    return call


for name, (real, fake) in OPERATORS.items():
    LIBRARY.impl(name, _constant(real), "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=LIBRARY)
