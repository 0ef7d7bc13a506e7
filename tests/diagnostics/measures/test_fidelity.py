import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pre_kernels.diagnostics import Moments, cka_of_moments, cknna, linear_cka, mean_cosine


def pair(rows=40, d=7, z=5, seed=0):
    """Two feature matrices, neither centred. One is a noisy linear image of the other."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=g, dtype=torch.double)
    y = x @ torch.randn(d, z, generator=g, dtype=torch.double) + torch.randn(
        rows, z, generator=g, dtype=torch.double
    )
    return x + 2, y - 3


def rotation(width, seed=3):
    return torch.linalg.qr(
        torch.randn(width, width, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    ).Q


def gram_cka(x, y):
    """The definition over row-by-row matrices."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.double) - 1 / n
    k, l = (centre @ (side @ side.T) @ centre for side in (x, y))  # noqa: E741
    return ((k * l).sum() / (k.norm() * l.norm())).item()


def gram_cka_debiased(x, y):
    """Song et al. 2012, equation 5, over row-by-row matrices."""

    def hsic(a, b):
        n = len(a)
        k, l = ((side @ side.T).fill_diagonal_(0) for side in (a, b))  # noqa: E741
        return (
            (k * l).sum()
            + k.sum() * l.sum() / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (k.sum(0) * l.sum(0)).sum()
        ).item()

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def cknna_by_numpy(x, y, neighbours):
    """The definition in NumPy, for one row's neighbours at a time."""
    n = len(x)
    sides = []
    for side in (x.numpy(), y.numpy()):
        rows = side / np.sqrt((side**2).sum(1))[:, None]
        near = [
            set(sorted(set(range(n)) - {i}, key=lambda j: -(rows[i] @ rows[j]))[:neighbours])
            for i in range(n)
        ]
        sides.append((rows, near))

    def align(a, b):
        k, l = (  # noqa: E741
            np.array(
                [
                    [rows[i] @ rows[j] if j in a[1][i] & b[1][i] else 0.0 for j in range(n)]
                    for i in range(n)
                ]
            )
            for rows, _ in (a, b)
        )
        ones = np.ones(n)
        spread = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
        return (np.trace(k @ l) + spread - 2 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3))

    first, other = sides
    return align(first, other) / math.sqrt(align(first, first) * align(other, other))


def streamed(x, y, cuts, debiased):
    xx, xy, yy = Moments(), Moments(), Moments()
    for a, b in zip(x.split(cuts), y.split(cuts), strict=True):
        xx.update(a)
        xy.update(a, b)
        yy.update(b)
    return cka_of_moments(xx, xy, yy, debiased=debiased)


ORACLES = {False: gram_cka, True: gram_cka_debiased}


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_equals_the_definition_whole_and_streamed(debiased):
    for rows in (40, 6):  # more rows than features, and fewer
        x, y = pair(rows)
        expected = ORACLES[debiased](x, y)
        assert linear_cka(x, y, debiased=debiased) == pytest.approx(expected, rel=1e-9)
        assert streamed(x, y, 1, debiased) == pytest.approx(expected, rel=1e-9)
        assert streamed(x, y, 4, debiased) == pytest.approx(expected, rel=1e-9)


def test_moments_merge_and_stay_exact_under_offsets():
    x, y = pair()
    offset = torch.zeros(7, dtype=torch.double)
    offset[1] = 1e4
    whole = Moments()
    whole.update(x, y)
    parts = [Moments() for _ in range(3)]
    for part, a, b in zip(parts, (x + offset).split([1, 30, 9]), y.split([1, 30, 9]), strict=True):
        for chunk, other in zip(a.split(8), b.split(8), strict=True):
            part.update(chunk, other)
    merged = Moments()
    for part in parts:
        merged.merge(part)
    for name in ("product", "square_x", "square_y", "quartic", "cubic_x", "cubic_y", "mean_y"):
        torch.testing.assert_close(
            getattr(merged, name), getattr(whole, name), rtol=1e-9, atol=1e-8
        )
    p, q = ((side - side.mean(0)).square().sum(1) for side in (x, y))
    torch.testing.assert_close(whole.quartic, p @ q)
    torch.testing.assert_close(whole.cubic_x, q @ (x - x.mean(0)))
    torch.testing.assert_close(
        whole.product / 40, torch.cov(torch.cat([x, y], 1).T, correction=0)[:7, 7:]
    )
    for debiased in (False, True):
        assert streamed(x + offset, y, 3, debiased) == pytest.approx(
            ORACLES[debiased](x, y), rel=1e-8
        )


def test_cka_known_answers():
    x, _ = pair()
    assert linear_cka(x, 3 * x @ rotation(7) + 5) == pytest.approx(1)
    assert linear_cka(x, 3 * x @ rotation(7) + 5, debiased=True) == pytest.approx(1)
    a = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    # y is one of two equal features of x, so |x̄ᵀȳ|² = 4, over √(8 · 4).
    assert linear_cka(a, a[:, :1]) == pytest.approx(4 / math.sqrt(8 * 4))
    assert linear_cka(a[:, :1], a[:, 1:]) == pytest.approx(0)


def test_debiased_cka_of_independent_features_is_about_0():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, 100, generator=g) for _ in range(2))
    assert linear_cka(x, y) > 0.5
    assert linear_cka(x, y, debiased=True) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("function", [linear_cka, lambda x, y: linear_cka(x, y, debiased=True)])
def test_cka_invariances(function):
    x, y = pair()
    expected = function(x, y)
    order = torch.randperm(40)
    assert function(x[order], y[order]) == pytest.approx(expected, rel=1e-9)
    assert function(x @ rotation(7), y @ rotation(5)) == pytest.approx(expected, rel=1e-9)
    assert function(1e3 * x + 7, 1e-3 * y - 7) == pytest.approx(expected, rel=1e-6)
    assert function(y, x) == pytest.approx(expected, rel=1e-9)
    stretched = x * torch.tensor([10.0, 1, 1, 1, 1, 1, 1])
    assert abs(function(stretched, y) - expected) > 0.01


def test_mean_cosine():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 6, generator=g), torch.randn(20, 6, generator=g)
    expected = F.cosine_similarity(x.double(), y.double(), dim=-1).mean().item()
    assert mean_cosine(x, y) == pytest.approx(expected, rel=1e-6)
    assert mean_cosine(x, -3 * x) == pytest.approx(-1)
    assert mean_cosine(torch.eye(3), torch.eye(3).roll(1, 0)) == 0
    assert mean_cosine(torch.tensor([[0.0, 0], [1, 1]]), torch.ones(2, 2)) == pytest.approx(0.5)
    turn = rotation(6).float()
    scale = torch.rand(20, 1, generator=g) + 0.1
    order = torch.randperm(20)
    assert mean_cosine((x * scale @ turn)[order], (y @ turn)[order]) == pytest.approx(
        expected, rel=1e-4
    )
    assert mean_cosine(x @ turn, x) < 0.9


@pytest.mark.parametrize("neighbours", [1, 4, 10, 39])
def test_cknna_equals_the_definition_in_numpy(neighbours):
    x, y = pair()
    assert cknna(x, y, neighbours) == pytest.approx(cknna_by_numpy(x, y, neighbours), rel=1e-9)


def wave(rows, width, step):
    return torch.sin(step * torch.arange(rows * width, dtype=torch.double).reshape(rows, width))


# The published values are those of the authors' code (github.com/minyoungg/platonic-rep at dcd76ba)
# on the unit rows. It adds 1e-6 to the denominator.
@pytest.mark.parametrize(
    ("neighbours", "published"), [(5, 0.221277), (10, 0.628267), (59, 0.905121)]
)
def test_cknna_is_what_its_authors_publish(neighbours, published):
    x = wave(60, 9, 1.7) + 0.5
    y = x[:, :6] + 0.6 * wave(60, 6, 0.9)
    assert cknna(x, y, neighbours) == pytest.approx(published, abs=1e-5)


def test_cknna_of_all_neighbours_is_cka_of_the_unit_rows():
    x, y = pair()
    expected = linear_cka(F.normalize(x), F.normalize(y), debiased=True)
    assert cknna(x, y, 39) == pytest.approx(expected, rel=1e-9)


def test_cknna_known_answers_and_invariances():
    x, y = pair()
    expected = cknna(x, y, 4)
    assert cknna(x, 2 * x @ rotation(7), 4) == pytest.approx(1)
    order = torch.randperm(40)
    scale = torch.rand(40, 1, dtype=torch.double) + 0.1
    assert cknna((x * scale @ rotation(7))[order], (y @ rotation(5))[order], 4) == pytest.approx(
        expected, rel=1e-9
    )
    assert cknna(y, x, 4) == pytest.approx(expected, abs=0.01)  # neighbours are not mutual
    assert cknna(x + 5, y, 4) != pytest.approx(expected, rel=0.01)
    # Rows form pairs, with different partners on each side, so no neighbour is shared.
    pairs = torch.eye(4, dtype=torch.double).repeat_interleave(2, 0)
    assert cknna(pairs, pairs[[0, 2, 4, 6, 1, 3, 5, 7]], 1) == 0


def test_what_does_not_vary_is_nan():
    x, y = pair()
    constant = torch.full((40, 3), 0.1)
    for debiased in (False, True):
        assert math.isnan(linear_cka(x, constant, debiased=debiased))
        assert math.isnan(linear_cka(constant, y, debiased=debiased))
    assert math.isnan(cknna(x, constant, 3))
    assert math.isnan(cknna(x[:3], y[:3], 2))
    assert math.isnan(linear_cka(x[:1], y[:1]))
    assert math.isnan(linear_cka(x[:3], y[:3], debiased=True))


ONE, TWO = torch.ones(3, 2), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mean_cosine(ONE, TWO), ValueError, "anchor: got width 4, want that of hidden, 2"),
        (lambda: mean_cosine([1.0], TWO), TypeError, "hidden: got list"),
        (
            lambda: mean_cosine(ONE, ONE[:2]),
            ValueError,
            "anchor: got 2 rows, want as many as hidden has, 3",
        ),
        (lambda: linear_cka(ONE.long(), TWO), TypeError, "x: got torch.int64"),
        (lambda: linear_cka(ONE, TWO[:0]), ValueError, r"y: got shape \(0, 4\)"),
        (lambda: linear_cka(ONE, TWO * math.nan), ValueError, "y: got nan"),
        (lambda: linear_cka(ONE, TWO[:1]), ValueError, "y: got 1 rows"),
        (lambda: cknna(ONE, TWO, 3), ValueError, "neighbours: got 3, want fewer than the 3 rows"),
        (lambda: cknna(ONE, TWO, 0), ValueError, "neighbours: got 0"),
        (
            lambda: cka_of_moments(Moments(), Moments(), Moments()),
            ValueError,
            "xx, xy, yy: got 0, 0 and 0 rows",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
