"""How much of the anchor a layer still holds: cosine, CKA and CKNNA between the rows of both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import inputs
from .moments import Moments


def mean_cosine(hidden: Tensor, anchor: Tensor) -> float:
    """Mean over rows of the cosine similarity of `hidden` and `anchor`, in -1..1, no unit.

    Without a predictor, L_PRe is the negative of this (arXiv 2603.20808). Both are (N, width),
    floating point, finite, not empty, and computed in float64. Scaling a row, applying one rotation
    to both and reordering the rows of both change nothing. Rotating only one of them or moving the
    origin changes the result. A row of zeros counts as 0.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """
    _check_pair("hidden", hidden, "anchor", anchor)
    if hidden.shape != anchor.shape:
        raise ValueError(
            f"anchor: got width {anchor.shape[1]}, want that of hidden, {hidden.shape[1]}"
        )
    return (inputs.unit(hidden) * inputs.unit(anchor).to(hidden.device)).sum(1).mean().item()


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """Centred kernel alignment of the linear kernels of two feature matrices (Kornblith et al.
    2019), no unit.

        CKA        = HSIC(x, y) / √(HSIC(x, x) · HSIC(y, y))
        HSIC(x, y) = |x̄ᵀ ȳ|²_F                                  x̄, ȳ centred over the rows

    The value is in 0..1. It is 1 if the rows of one are a rotated, scaled and moved copy of the
    other's. Unless there are several times as many rows as features, it is well above 0 even for
    independent features. `debiased` uses the unbiased HSIC of Song et al. 2012 instead: at most 1,
    about 0 for independent features and so sometimes slightly below 0. It needs 4 rows. Rotating,
    moving or scaling either side and reordering the rows of both change nothing. Scaling single
    features or rows changes the result. The value is nan if one side does not vary.

    For a stream of rows, use three `Moments`, of (x, x), (x, y) and (y, y), and `cka_of_moments`.
    No row-by-row matrix is made.

    Args:
        x: (N, d), floating point, computed in float64.
        y: (N, z), the same rows.
        debiased: whether to use the unbiased HSIC.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """
    _check_pair("x", x, "y", y)
    xx, xy, yy = Moments(), Moments(), Moments()
    xx.add(x)
    xy.add(x, y)
    yy.add(y)
    return cka_of_moments(xx, xy, yy, debiased=debiased)


def cka_of_moments(xx: Moments, xy: Moments, yy: Moments, *, debiased: bool = False) -> float:
    """`linear_cka` of all the rows that the three have seen. ValueError unless all three have seen
    the same number of rows, at least one."""
    if not xx.rows == xy.rows == yy.rows > 0:
        raise ValueError(
            f"xx, xy, yy: got {xx.rows}, {xy.rows} and {yy.rows} rows, want as many in each, at "
            "least one"
        )
    if not all(xy.varies()):
        return math.nan
    both = [moments.hsic(debiased) for moments in (xx, yy)]
    if not min(both) > 0:  # or nan
        return math.nan
    return xy.hsic(debiased) / math.sqrt(both[0]) / math.sqrt(both[1])


def cknna(x: Tensor, y: Tensor, neighbours: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment: debiased CKA that looks only at shared neighbours
    (Huh et al. 2024).

    Rows are scaled to unit length, K = x xᵀ, L = y yᵀ, and N_K(i) is the `neighbours` rows most
    similar to row i, without i itself:

        align(K, L) = HSIC(M ∘ K, M ∘ L),     M_ij = 1 where j is in N_K(i) ∩ N_L(i), else 0
        CKNNA       = align(K, L) / √(align(K, K) · align(L, L))

    HSIC is the unbiased one of Song et al. 2012, equation 5. This is the definition in the authors'
    own code, and so the one behind published values. Their paper writes Σ K̄_ij · L̄_ij over the same
    pairs instead, centred before the neighbours are chosen, which gives other values. Published
    features also had their outliers clipped.

    With all other rows as neighbours the value is the debiased `linear_cka` of the unit rows. It is
    1 for equal neighbourhoods and similarities, and 0 or slightly below 0 if no neighbours are
    shared. No unit. Rotating either side, scaling rows and reordering the rows of both change
    nothing. Moving the origin changes the result. Being a neighbour is not mutual, so swapping x
    and y may change the third digit. The value is nan with fewer than 4 rows, or if the alignment
    of one side with itself is not positive, for example because all its rows are equal.

    Args:
        x: (N, d), floating point, computed in float64. A few N-by-N matrices are made, so pass a
            sample.
        y: (N, z), the same rows.
        neighbours: fewer than N.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """
    _check_pair("x", x, "y", y)
    inputs.check_positive("neighbours", neighbours)
    if neighbours >= len(x):
        raise ValueError(f"neighbours: got {neighbours}, want fewer than the {len(x)} rows")
    if len(x) < 4:
        return math.nan
    similar_x, near_x = _neighbourhood(x, neighbours)
    similar_y, near_y = _neighbourhood(y.to(x.device), neighbours)
    own = [
        _hsic(similar, similar, near)
        for similar, near in ((similar_x, near_x), (similar_y, near_y))
    ]
    # If the similarities differ by less than this, they are equal up to rounding, and which rows
    # are the nearest is chance.
    spread = [(similar.max() - similar.min()).item() for similar in (similar_x, similar_y)]
    if min(spread) <= 1e-12 or not min(own) > 0:
        return math.nan
    return _hsic(similar_x, similar_y, near_x & near_y) / math.sqrt(own[0] * own[1])


def _neighbourhood(x: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The similarities of rows, and whether j is a neighbour of i, each (N, N)."""
    x = inputs.unit(x)
    similarity = x @ x.T
    nearest = similarity.clone().fill_diagonal_(-torch.inf).topk(neighbours, dim=1).indices
    return similarity, torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, nearest, True)


def _hsic(k: Tensor, l: Tensor, near: Tensor) -> float:  # noqa: E741
    """HSIC of k and l (Song et al. 2012, equation 5) without its factor 1 / (n(n - 3)). Entries
    count only where `near` is True, which its diagonal never is."""
    n = len(k)
    k = k.where(near, 0)
    l = l.where(near, 0)  # noqa: E741
    mixed = k.sum(0) @ l.sum(1)
    return ((k * l.T).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)).item()


def _check_pair(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    inputs.check_rows(x_name, x)
    inputs.check_rows(y_name, y)
    inputs.check_aligned(y_name, y, x_name, x)
