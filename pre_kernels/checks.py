"""Every argument check of `fused_pre_loss`: a wrong argument raises here, by name, before any
work."""

from __future__ import annotations

import math
import os
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .problem import Options, Problem

# The losses of a row, and all.
LOSSES = ("cosine", "mse", "smooth_l1")
ALL_LOSSES = (*LOSSES, "gram")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
NORMS = ("layer", "rms")
REDUCTIONS = ("mean", "sum", "none")
IMPLEMENTATIONS = ("auto", "triton", "blas", "torch")

# The widest row, in elements, whose scale one program finds.
FP8_LONGEST = 8192


def debugging() -> bool:
    return os.environ.get("PRE_KERNELS_DEBUG") == "1"


def choice(name: str, value: Any, wanted: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in wanted:
        raise ValueError(f"{name}: got {value!r}, want one of {', '.join(map(repr, wanted))}")
    return value


def width(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), want a positive int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, want a positive int")
    return value


def nonnegative(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), want a number")
    # Dynamo cannot trace math.isfinite of a number that may change.
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value}, want a finite number ≥ 0")
    return float(value)


def _tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: got {type(value).__name__}, want a torch.Tensor (torch.as_tensor makes one "
            "of a list or an array)"
        )
    # This test for a DTensor does not import torch.distributed.tensor.
    if hasattr(value, "placements"):
        raise TypeError(
            f"{name}: got a DTensor, want a plain tensor; call the head through its own forward so "
            "that FSDP gathers its parameters, and pass hidden states as .to_local() or "
            ".full_tensor()"
        )
    if value.layout != torch.strided or value.is_nested or value.is_meta:
        kind = "nested" if value.is_nested else "meta" if value.is_meta else str(value.layout)
        raise TypeError(f"{name}: got a {kind} tensor, want a dense one with data")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got device {value.device}, want hidden's device {device}")
    return value


def _floating(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    tensor = _tensor(name, value, device)
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}, want float16, bfloat16, float32 or float64 "
            f"({name}.float() converts it)"
        )
    return tensor


def _shape(name: str, value: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != wanted:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, want {meaning} = {wanted}"
            f"{'' if name == 'rows' else ' (in a PreHead m is hidden_dim, z is out_dim)'}"
        )


def under_autocast(device: str) -> bool:
    # Dynamo of torch 2.9 cannot trace torch.amp.is_autocast_available, so the exception is the
    # answer.
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # The device "meta" has no autocast.
        return False


def _product_dtype(hidden: Tensor, parameters: dict[str, Tensor]) -> torch.dtype:
    device = hidden.device.type
    if under_autocast(device):
        doubles = [name for name, value in parameters.items() if value.dtype == torch.float64]
        if not doubles and hidden.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        if len(doubles) == len(parameters) and hidden.dtype == torch.float64:
            return torch.float64
    for name, value in parameters.items():
        if value.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: got dtype {value.dtype}, want hidden's dtype {hidden.dtype}; convert one "
                "by .to(dtype), or use torch.autocast"
            )
    return hidden.dtype


def _check_rows(rows: Any, leading: torch.Size, device: torch.device) -> Tensor:
    selection = _tensor("rows", rows, device)
    shape = tuple(selection.shape)
    dtype = selection.dtype
    if dtype == torch.bool:
        _shape("rows", selection, tuple(leading), "hidden's leading shape")
        return selection.flatten()
    if dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"rows: got dtype {dtype}, want bool (a mask; rows.bool() is one), int32 or int64 "
            "(flat row indices)"
        )
    if selection.dim() != 1:
        raise ValueError(
            f"rows: got shape {shape} of {dtype}, want (N,) flat row indices, or a mask of dtype "
            "bool (rows.bool() is one)"
        )
    return selection


def _check_normalizer(normalizer: Any, reduction: str) -> float | Tensor | None:
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"normalizer: got one with reduction={reduction!r}, want None, or reduction='mean', "
            "whose divisor it replaces"
        )
    if isinstance(normalizer, Tensor):
        _tensor("normalizer", normalizer)
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer: got shape {tuple(normalizer.shape)}, want a number or a 0-d tensor"
            )
        if normalizer.is_complex() or normalizer.dtype == torch.bool:
            raise TypeError(f"normalizer: got dtype {normalizer.dtype}, want a real number")
        if normalizer.requires_grad:
            raise TypeError("normalizer: requires grad, want a constant: normalizer.detach()")
        return normalizer
    if isinstance(normalizer, bool) or not isinstance(normalizer, Real):
        raise TypeError(
            f"normalizer: got {type(normalizer).__name__}, want a number or a 0-d tensor"
        )
    try:
        value = float(normalizer)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"normalizer: got {value}, want a finite number")
    return value


def _check_layers(
    layers: dict[str, Any], dim: int, out_dim: int, device: torch.device
) -> dict[str, Tensor]:
    """Check the weights and biases of a head's layers, and return those that are not None."""
    depth = 3 if layers["w3"] is not None else 2 if layers["w2"] is not None else 1
    names = ("d", *("m", "m2")[: depth - 1], "z")
    present = {}
    columns = dim
    for number in range(1, 4):
        name = f"w{number}"
        bias = layers[f"b{number}"]
        if number > depth:
            if bias is not None:
                raise ValueError(f"b{number}: got a bias without a {name}, want None")
            continue
        w = present[name] = _floating(name, layers[name], device)
        width, given = names[number], names[number - 1]
        source = "hidden's last" if number == 1 else f"w{number - 1}'s first"
        if number == depth:
            meaning = (
                f"({width}, {given}), {width} as anchor's last dimension and {given} as {source},"
            )
            _shape(name, w, (out_dim, columns), meaning)
        elif w.dim() != 2 or w.shape[1] != columns or w.shape[0] == 0:
            raise ValueError(
                f"{name}: got shape {tuple(w.shape)}, want ({width}, {given}) with {given} = "
                f"{columns} as {source} dimension: the layout of nn.Linear({columns}, "
                f"{width}).weight{f' and of PreHead(dim={dim})' if number == 1 else ''}"
            )
        columns = w.shape[0]
        if bias is not None:
            present[f"b{number}"] = _floating(f"b{number}", bias, device)
            _shape(f"b{number}", bias, (columns,), f"({width},)")
    return present


def _check_norm(
    norm: Any, weight: Any, bias: Any, eps: Any, dim: int, device: torch.device
) -> dict[str, Tensor]:
    """Check the arguments of a norm, and return its tensors that are not None."""
    present = {}
    if norm is not None:
        choice("norm", norm, NORMS)
        nonnegative("norm_eps", eps)
    for name, value in (("norm_weight", weight), ("norm_bias", bias)):
        if value is None:
            continue
        if norm is None or (norm == "rms" and name == "norm_bias"):
            wanted = "norm='layer'" if name == "norm_bias" else "norm='layer' or 'rms'"
            raise ValueError(f"{name}: got a tensor with norm={norm!r}, want {wanted}, or None")
        present[name] = _floating(name, value, device)
        _shape(name, value, (dim,), "(d,)")
    return present


def _is_compact(name: str, value: Tensor, count: int | None, leading: torch.Size) -> bool:
    """Whether a value for each row is (N,), not of hidden's leading shape.

    (N,) is the first reading, but the N of a mask is not known here, and `count` is None: a value
    that has the mask's own shape is read as (R,).
    """
    if count is not None and tuple(value.shape) == (count,):
        return True
    if value.shape == leading:
        return False
    if value.dim() != 1 or count is not None:
        selected = "N" if count is None else str(count)
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, want ({selected},), one for each selected "
            f"row, or hidden's leading shape {tuple(leading)}"
        )
    return True


def _check_fp8(precision: Any, dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    if precision != "fp8":
        raise ValueError(f"precision: got {precision!r}, want 'fp8' or None (the inputs' own)")
    if dtype != torch.bfloat16:
        raise TypeError(
            f"precision: got 'fp8' with products in {dtype}, want torch.bfloat16 inputs, autocast "
            "to it, or precision=None"
        )
    if any(width % 16 or width > FP8_LONGEST for width in widths):
        raise ValueError(
            f"precision: got 'fp8' with widths {widths}, want multiples of 16 up to "
            f"{FP8_LONGEST} (a row's scale is found by one program)"
        )


def arguments(
    hidden: Any,
    anchor: Any,
    layers: dict[str, Any],
    rows: Any,
    *,
    loss: Any,
    activation: Any,
    row_weight: Any,
    reduction: Any,
    normalizer: Any,
    workspace: Any,
    capacity: Any,
    precision: Any,
    norm: tuple[Any, Any, Any, Any],
    images: Any,
) -> Problem:
    """Check the arguments of `fused_pre_loss` and flatten their leading shapes, without reading the
    device. `layers` holds its w1, b1, ..., b3 by name; `norm` is its norm, weight, bias and eps."""
    choice("loss", loss, ALL_LOSSES)
    if (loss == "gram") == (images is None):
        raise ValueError(
            f"images: got {images if images is None else 'a value'} with loss={loss!r}, want the "
            "number of each row's image, or 'batch', for loss='gram', and None for others"
        )
    if loss == "gram" and precision is not None:
        raise ValueError(f"precision: got {precision!r} with loss='gram', want None")
    choice("activation", activation, ACTIVATIONS)
    choice("reduction", reduction, REDUCTIONS)
    if workspace is not None:
        width("workspace", workspace)

    hidden = _floating("hidden", hidden)
    device = hidden.device
    anchor = _floating("anchor", anchor, device)
    if hidden.dim() < 2:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, want (..., d) with at least one leading "
            "dimension (hidden[None] has one)"
        )
    if anchor.dim() < 2:
        raise ValueError(
            f"anchor: got shape {tuple(anchor.shape)}, want hidden's leading shape + (z,), or "
            "(N, z) with one row for each selected row"
        )
    leading = hidden.shape[:-1]
    dim = hidden.shape[-1]
    total = math.prod(leading)
    out_dim = anchor.shape[-1]
    if dim == 0 or out_dim == 0:
        raise ValueError(
            f"{'hidden' if dim == 0 else 'anchor'}: got a last dimension of 0, want at least 1"
        )
    parameters = _check_layers(layers, dim, out_dim, device)
    scales = _check_norm(*norm, dim, device)
    dtype = _product_dtype(hidden, parameters | scales)

    if rows is not None:
        rows = _check_rows(rows, leading, device)
    if precision is not None:
        weights = (w for name, w in parameters.items() if name[0] == "w")
        _check_fp8(precision, dtype, (dim, *(w.shape[0] for w in weights)))
    if capacity is not None:
        width("capacity", capacity)
        if rows is None or rows.dtype != torch.bool:
            raise ValueError(
                f"capacity: got {capacity} without a mask, want None (it bounds the count of a "
                "mask `rows`)"
            )
        capacity = min(capacity, total)
    # This is N, or None for a mask, whose count is compared once it is known.
    count = total if rows is None else None if rows.dtype == torch.bool else rows.numel()

    anchor_compact = anchor.shape[:-1] != leading
    if anchor_compact and (anchor.dim() != 2 or (count is not None and anchor.shape[0] != count)):
        selected = "N" if count is None else str(count)
        raise ValueError(
            f"anchor: got shape {tuple(anchor.shape)}, want hidden's leading shape + (z,) = "
            f"{(*leading, out_dim)}, or one row for each selected row = ({selected}, {out_dim})"
        )

    weight_compact = images_compact = False
    if row_weight is not None:
        row_weight = _floating("row_weight", row_weight, device)
        if row_weight.requires_grad:
            raise TypeError("row_weight: requires grad, want a constant: row_weight.detach()")
        weight_compact = _is_compact("row_weight", row_weight, count, leading)
    numbers = None
    if isinstance(images, str):
        choice("images", images, ("batch",))
    elif images is not None:
        numbers = _tensor("images", images)
        if numbers.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"images: got dtype {numbers.dtype}, want int32 or int64 numbers")
        images_compact = _is_compact("images", numbers, count, leading)

    normalizer = _check_normalizer(normalizer, reduction)
    number = None if isinstance(normalizer, Tensor) else normalizer
    return Problem(
        hidden=hidden.flatten(0, -2),
        **layers,
        norm_weight=None if norm[1] is None else norm[1].contiguous(),
        norm_bias=None if norm[2] is None else norm[2].contiguous(),
        anchor=anchor.detach().flatten(0, -2),
        rows=rows,
        weight=None if row_weight is None else row_weight.flatten(),
        images=None if numbers is None else numbers.flatten(),
        normalizer=None if number is normalizer else normalizer,
        options=Options(
            loss=loss,
            activation=activation,
            reduction=reduction,
            dtype=dtype,
            anchor_compact=anchor_compact,
            weight_compact=weight_compact,
            images_compact=images_compact,
            divisor=number,
            workspace=workspace,
            capacity=capacity,
            precision=precision,
            norm=norm[0],
            norm_eps=norm[-1],
        ),
    )
