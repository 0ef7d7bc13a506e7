"""The oracle for float64: loss and gradients by hand-written derivatives of the equations, in
NumPy's long doubles.

On x86 these have 64 bits of mantissa, 11 more than float64. Other machines have more bits, or no
long doubles: see `AVAILABLE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pre_kernels.check.rule import Case, ramp

Wide = np.ndarray
LONG = np.longdouble
AVAILABLE = np.finfo(LONG).eps < 2**-60
PI = LONG("3.14159265358979323846264338327950288")


def selected(case: Case) -> Tensor:
    """(N,) flat rows in selection order."""
    if case.rows is None:
        return torch.arange(
            case.tensors["hidden"][..., 0].numel(), device=case.tensors["hidden"].device
        )
    return (
        case.rows.reshape(-1).nonzero().squeeze(1)
        if case.rows.dtype == torch.bool
        else case.rows.long()
    )


def erfc(x: Wide) -> Wide:
    """erfc by its power series near 0 and by its continued fraction elsewhere, computed for |x|:
    erfc(-x) = 2 - erfc(x)."""
    y = np.abs(x)
    near = np.minimum(np.abs(x), 1)
    far = np.maximum(np.abs(x), 1)
    term = total = near
    for n in range(1, 40):
        term = term * 2 * near**2 / (2 * n + 1)
        total = total + term
    inside = 1 - 2 / np.sqrt(PI) * np.exp(-(near**2)) * total
    fraction = far
    for n in range(300, 0, -1):
        fraction = far + LONG(n) / 2 / fraction
    value = np.where(y < 1, inside, np.exp(-(far**2)) / (np.sqrt(PI) * fraction))
    return np.where(x < 0, 2 - value, value)


def _sigmoid(x: Wide) -> Wide:
    return 1 / (1 + np.exp(-x))


def _gelu(z: Wide) -> tuple[Wide, Wide]:
    phi = erfc(-z / np.sqrt(LONG(2))) / 2
    return z * phi, phi + z * np.exp(-(z**2) / 2) / np.sqrt(2 * PI)


def _gelu_tanh(z: Wide) -> tuple[Wide, Wide]:
    cubic = LONG("0.044715")
    c = np.sqrt(2 / PI)
    u, slope = 2 * c * (z + cubic * z**3), 2 * c * (1 + 3 * cubic * z**2)
    return z * _sigmoid(u), _sigmoid(u) + z * (_sigmoid(u) * _sigmoid(-u)) * slope


def _silu(z: Wide) -> tuple[Wide, Wide]:
    return z * _sigmoid(z), _sigmoid(z) + z * (_sigmoid(z) * _sigmoid(-z))


def _relu(z: Wide) -> tuple[Wide, Wide]:
    return np.maximum(z, 0), (z > 0).astype(LONG)


# Each returns (value, derivative).
ACTIVATIONS: dict[str, Callable[[Wide], tuple[Wide, Wide]]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "relu": _relu,
}


def _cosine(p: Wide, a: Wide) -> tuple[Wide, Wide]:
    norm = np.sqrt((p**2).sum(1, keepdims=True))
    clamped = np.maximum(norm, LONG(1e-8))
    p, a = p / clamped, a / np.maximum(np.sqrt((a**2).sum(1, keepdims=True)), LONG(1e-8))
    cosine = (p * a).sum(1, keepdims=True)
    # PyTorch clamps the norm but not its derivative.
    stretch = np.where(norm > 0, clamped / np.where(norm > 0, norm, 1), 0)
    return -cosine[:, 0], (cosine * stretch * p - a) / clamped


def _mse(p: Wide, a: Wide) -> tuple[Wide, Wide]:
    return ((p - a) ** 2).mean(1), 2 * (p - a) / p.shape[1]


def _smooth_l1(p: Wide, a: Wide) -> tuple[Wide, Wide]:
    e = np.abs(p - a)
    return np.where(e < 1, e**2 / 2, e - LONG(0.5)).mean(1), np.clip(p - a, -1, 1) / p.shape[1]


# Each returns (ℓ of each row, dℓ/dp).
ROW_LOSSES: dict[str, Callable[[Wide, Wide], tuple[Wide, Wide]]] = {
    "cosine": _cosine,
    "mse": _mse,
    "smooth_l1": _smooth_l1,
}


def _normalized(x: Wide, norm: str | None, eps: float) -> tuple[Wide, Wide | int]:
    """The rows after the norm, and 1 / std of each."""
    if norm is None:
        return x, 1
    x = x - x.mean(1, keepdims=True) if norm == "layer" else x
    inverse = 1 / np.sqrt((x**2).mean(1, keepdims=True) + LONG(eps))
    return x * inverse, inverse


def run(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Loss and gradients of a case, each as the sum of two float64 tensors: the rounded value, and
    the rest that rounding lost."""
    # exp of a large number is inf, and then 1 / inf = 0 is the right result.
    with np.errstate(all="ignore"):
        return _run(case)


def _run(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    t = {
        name: None if x is None else x.detach().double().cpu().numpy().astype(LONG)
        for name, x in case.tensors.items()
    }
    options = case.options
    index = selected(case).cpu().numpy()
    h = t["hidden"].reshape(-1, t["hidden"].shape[-1])
    compact = case.tensors["anchor"].shape[:-1] != case.tensors["hidden"].shape[:-1]
    a = t["anchor"].reshape(-1, t["anchor"].shape[-1])
    x = h[index]
    a = a if compact else a[index]

    def linear(x: Wide, weight: Wide, bias: Wide | None) -> Wide:
        return x @ weight.T if bias is None else x @ weight.T + bias

    norm = options.get("norm")
    unit, inverse = _normalized(x, norm, options.get("norm_eps", 1e-5))
    x = unit if t.get("norm_weight") is None else unit * t["norm_weight"]
    x = x if t.get("norm_bias") is None else x + t["norm_bias"]
    layers = [i for i in (1, 2, 3) if t.get(f"w{i}") is not None]
    inputs, slopes = [x], []
    for i in layers[:-1]:
        y = linear(inputs[-1], t[f"w{i}"], t[f"b{i}"])
        for values, value in zip(
            (inputs, slopes), ACTIVATIONS[options.get("activation", "gelu")](y), strict=True
        ):
            values.append(value)
    p = linear(inputs[-1], t[f"w{layers[-1]}"], t[f"b{layers[-1]}"])
    losses, dp = ROW_LOSSES[options.get("loss", "cosine")](p, a)

    weight = options.get("row_weight")
    reduction = options.get("reduction", "mean")
    divisor = LONG(len(index))
    if weight is not None:
        masked = case.rows is not None and case.rows.dtype == torch.bool
        leading = weight.shape != index.shape or (
            masked and weight.shape == case.tensors["hidden"].shape[:-1]
        )
        weight = weight.double().cpu().numpy().reshape(-1).astype(LONG)
        weight = weight[index] if leading else weight
        losses = losses * weight
        dp = dp * weight[:, None]
        divisor = weight.sum()
    if options.get("normalizer") is not None:
        divisor = LONG(float(options["normalizer"]))
    if reduction == "none":
        dp = dp * (case.upstream * ramp(len(index))).numpy().astype(LONG)[:, None]
    else:
        if reduction == "sum" or not len(index):
            divisor = LONG(1)
        divisor = divisor if divisor else LONG(math.nan)
        losses, dp = losses.sum() / divisor, dp * (LONG(case.upstream) / divisor)
    results = {}
    dx = dp
    for i in reversed(layers):
        dy = dx if i == layers[-1] else dx * slopes[i - 1]
        results[f"w{i}"] = dy.T @ inputs[i - 1]
        results[f"b{i}"] = dy.sum(0)
        dx = dy @ t[f"w{i}"]
    if norm is not None:
        results["norm_weight"] = (dx * unit).sum(0)
        results["norm_bias"] = dx.sum(0)
        dx = dx if t.get("norm_weight") is None else dx * t["norm_weight"]
        dx = dx - unit * (dx * unit).mean(1, keepdims=True)
        dx = (dx - dx.mean(1, keepdims=True) if norm == "layer" else dx) * inverse
    dh = np.zeros_like(h)
    dh[index] = dx
    results["hidden"] = dh.reshape(t["hidden"].shape)
    wanted = {
        name: value
        for name, value in results.items()
        if t.get(name) is not None and name not in case.frozen
    }
    return {
        name: _two(value, case) for name, value in {"loss": np.asarray(losses), **wanted}.items()
    }


def _two(x: Wide, case: Case) -> tuple[Tensor, Tensor]:
    high = x.astype(np.float64)
    low = np.where(np.isfinite(high), x - high, 0).astype(np.float64)
    device = case.tensors["hidden"].device
    return torch.from_numpy(high).to(device), torch.from_numpy(low).to(device)
