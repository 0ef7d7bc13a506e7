"""How much of the anchor a layer still holds: cosine, CKA and CKNNA between their rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import inputs
from .moments import Moments


def mean_cosine(hidden: Tensor, anchor: Tensor) -> float:
    """Mean over rows of the cosine similarity of `hidden` and `anchor`, in -1..1, no unit.

    What L_PRe is the negative of, without its predictor (arXiv 2603.20808). Both are (N, width),
    floating point, finite, not empty; computed in float64. Scaling a row, rotating both alike and
    reordering rows change nothing; rotating one of them, or moving the origin, does. A row of zeros
    counts as 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted.
    """
    _check_pair("hidden", hidden, "anchor", anchor)
    if hidden.shape != anchor.shape:
        raise ValueError(
            f"anchor: got width {anchor.shape[1]}, want that of hidden, {hidden.shape[1]}"
        )
    return (inputs.unit(hidden) * inputs.unit(anchor).to(hidden.device)).sum(1).mean().item()


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """Centred kernel alignment of the linear kernels of two feature matrices (Kornblith et al.
    2019); no unit.

        CKA        = HSIC(x, y) / √(HSIC(x, x) · HSIC(y, y))
        HSIC(x, y) = |x̄ᵀ ȳ|²_F                                  x̄, ȳ centred over the rows

    In 0..1; 1 when the rows of one are a rotated, scaled and moved copy of the other's. With fewer
    rows than some times the width it is well above 0 even for independent features; `debiased`
    takes the unbiased HSIC of Song et al. 2012 instead (at most 1, about 0 for independent
    features, and so sometimes just below), which needs 4 rows. Unchanged by rotating, moving and
    scaling either side and by reordering rows of both; not by scaling single features or rows. nan
    where one side does not vary.

    Over a stream of rows: three `Moments`, of (x, x), (x, y) and (y, y), and `cka_of_moments`. No
    row-by-row matrix.

    Args:
        x: (N, d), floating point, computed in float64.
        y: (N, z), the same rows.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted.
    """
    _check_pair("x", x, "y", y)
    xx, xy, yy = Moments(), Moments(), Moments()
    xx.add(x)
    xy.add(x, y)
    yy.add(y)
    return cka_of_moments(xx, xy, yy, debiased=debiased)


def cka_of_moments(xx: Moments, xy: Moments, yy: Moments, *, debiased: bool = False) -> float:
    """`linear_cka` of all the rows that the three have seen; ValueError unless they saw as many, at
    least one."""
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
    """Centred kernel nearest-neighbour alignment: debiased CKA that looks at shared neighbours
    alone (Huh et al. 2024).

    With rows scaled to unit length, K = x xᵀ and L = y yᵀ, and N_K(i) the `neighbours` rows most
    similar to row i, itself left out:

        align(K, L) = HSIC(M ∘ K, M ∘ L),     M_ij = 1 where j is in N_K(i) ∩ N_L(i), else 0
        CKNNA       = align(K, L) / √(align(K, K) · align(L, L))

    HSIC is the unbiased one of Song et al. 2012, equation 5. So the authors' own code has it, and
    with it what they and others have published; their paper writes Σ K̄_ij · L̄_ij over the same
    pairs, centred before the neighbours are chosen, whose values differ. Their features had their
    outliers clipped as well.

    With all other rows as neighbours it is `linear_cka` of the unit rows, debiased. 1 for equal
    neighbourhoods and similarities; 0 where no neighbours are shared, and sometimes just below. No
    unit. Unchanged by rotating either side, scaling rows and reordering the rows of both; not by
    moving the origin. Being a neighbour is not mutual, so x and y in each other's place may differ
    in the third digit. nan where one side's own alignment is not positive, as when all its rows are
    alike, and with fewer than 4 rows.

    Args:
        x: (N, d), floating point, computed in float64; a few N-by-N matrices are made, so pass a
            sample.
        y: (N, z), the same rows.
        neighbours: less than N.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted.
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
    # The similarities of unit vectors that differ by less are equal but for rounding: which rows
    # are the nearest would be chance.
    spread = [(similar.max() - similar.min()).item() for similar in (similar_x, similar_y)]
    if min(spread) <= 1e-12 or not min(own) > 0:
        return math.nan
    return _hsic(similar_x, similar_y, near_x & near_y) / math.sqrt(own[0] * own[1])


def _neighbourhood(x: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Similarities and whether j is a neighbour of i, each (N, N)."""
    x = inputs.unit(x)
    similarity = x @ x.T
    nearest = similarity.clone().fill_diagonal_(-torch.inf).topk(neighbours, dim=1).indices
    return similarity, torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, nearest, True)


def _hsic(k: Tensor, l: Tensor, near: Tensor) -> float:  # noqa: E741
    """Song et al. 2012, equation 5, up to its factor 1 / (n(n - 3)), of k and l where `near`, which
    has no diagonal."""
    n = len(k)
    k = k.where(near, 0)
    l = l.where(near, 0)  # noqa: E741
    mixed = k.sum(0) @ l.sum(1)
    return ((k * l.T).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)).item()


def _check_pair(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    inputs.check_rows(x_name, x)
    inputs.check_rows(y_name, y)
    inputs.check_aligned(y_name, y, x_name, x)
