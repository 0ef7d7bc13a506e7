import math

import pytest
import torch

from pre_kernels.diagnostics import Moments, Spectrum


def rows(count=200, width=9, seed=0):
    """Correlated features around a mean."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=g, dtype=torch.double) @ torch.randn(
        width, width, generator=g, dtype=torch.double
    )
    return mixed + 3 * torch.randn(width, generator=g, dtype=torch.double)


def measured(*batches, **options):
    spectrum = Spectrum(**options)
    for batch in batches:
        spectrum.update(batch)
    return spectrum.result()


def by_definition(x, above=100.0, times=1000.0):
    covariance = torch.cov(x.T)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    share = values.cumsum(0) / values.sum()
    correlation = torch.corrcoef(x.T).abs()
    apart = ~torch.eye(x.shape[1], dtype=torch.bool)
    massive = [
        [abs(a) > above and abs(a) >= times * row.abs().median().item() for a in row.tolist()]
        for row in x.double()
    ]
    return (
        (values.sum() ** 2 / values.square().sum()).item(),
        next(k for k, s in enumerate(share, 1) if s >= 0.9),
        correlation[apart].mean().item(),
        x.norm(dim=1).mean().item(),
        x.norm(dim=1).median().item(),
        x.norm(dim=1).max().item(),
        sum(map(sum, massive)) / x.numel(),
        sum(map(any, massive)) / len(x),
    )


def assert_equal(found, expected, rel=1e-9, median=0.006):
    assert found.norm_median == pytest.approx(expected[4], rel=median)
    assert found._replace(norm_median=0) == pytest.approx(
        (*expected[:4], 0, *expected[5:]), rel=rel
    )


def test_equals_the_definition():
    x = rows()
    x[3, 2], x[5, 5], x[5, 7] = 5e4, -3e5, 4e5
    expected = by_definition(x)
    assert expected[6:] == (3 / 1800, 2 / 200)
    assert_equal(measured(x), expected)


def test_any_batches_and_merging_change_nothing():
    x = rows()
    expected = measured(x)
    assert_equal(measured(*x.split(1)), expected)
    assert_equal(measured(*x.split([3, 90, 7, 100])), expected)
    parts = [Spectrum(), Spectrum(), Spectrum()]
    for part, batch in zip(parts, x.split([50, 149, 1]), strict=True):
        part.update(batch)
    kept = parts[1].result()
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    parts[0].merge(Spectrum())
    assert_equal(parts[0].result(), expected)
    assert parts[1].result() == kept
    empty = Spectrum()
    empty.merge(parts[0])
    assert_equal(empty.result(), expected)
    empty.update(x)
    assert_equal(parts[0].result(), expected)


def test_known_spectra():
    axes = torch.eye(10).repeat_interleave(2, 0) * torch.tensor([1.0, -1.0]).repeat(10)[:, None]
    spectrum = measured(axes)  # ten equal, uncorrelated directions
    assert spectrum.effective_dimension == pytest.approx(10)
    assert spectrum.components_90 == 9
    assert spectrum.correlation == pytest.approx(0)
    assert spectrum.norm_mean == spectrum.norm_max == pytest.approx(1)
    scales = torch.tensor([3.0, 1, 0, 0, 0, 0, 0, 0, 0, 0])  # variances 9 : 1
    spectrum = measured(axes * scales)
    assert spectrum.effective_dimension == pytest.approx((9 + 1) ** 2 / (81 + 1))
    assert spectrum.components_90 == 1
    line = torch.randn(50, 1) * torch.tensor([1.0, -2, 3])  # one direction: all features are alike
    spectrum = measured(line)
    assert spectrum.effective_dimension == pytest.approx(1)
    assert spectrum.correlation == pytest.approx(1)


def test_massive_activations():
    x = torch.full((4, 8), 0.0625)
    x[0, 0] = 100.0  # 1,600 times the median, but not above 100
    x[1, 0], x[1, 1] = -150.0, 101.0
    x[2] = 200.0  # large, but so is all of the row
    x[3, 5] = 1e6
    spectrum = measured(x)
    assert spectrum.massive_activations == 3 / 32
    assert spectrum.massive_tokens == 2 / 4
    assert (
        measured(x, above=99).massive_activations
        == measured(x, above=99, times=1600).massive_activations
        == 4 / 32
    )
    assert measured(x, times=1).massive_activations == 11 / 32
    assert spectrum.norm_max == pytest.approx(1e6)


def test_offsets_of_massive_activations_cost_no_accuracy():
    x = rows()
    expected = by_definition(x)
    offset = torch.zeros(9, dtype=torch.double)
    offset[2], offset[7] = 1e4, -1e8
    for size, spectrum in (
        (64, measured(*(x + offset).split(64))),
        (1, measured(*(x + offset).split(1))),
    ):
        # The remaining error is the rounding of the input at 1e8.
        assert spectrum[:3] == pytest.approx(expected[:3], rel=1e-6), size
    single = (x + offset.clamp(-1e4, 1e4)).float()
    assert measured(*single.split(10))[:3] == pytest.approx(
        by_definition(single.double())[:3], rel=1e-7
    )


def test_massive_variance_does_not_hide_the_rest():
    x = rows(width=30)
    x[:, 4] *= 1e4
    found = measured(*x.split(7))
    assert found.effective_dimension == pytest.approx(1, abs=0.01)
    assert found.correlation == pytest.approx(by_definition(x)[2], rel=1e-8)


def test_invariances():
    x = rows()
    expected = measured(x)
    g = torch.Generator().manual_seed(1)
    assert_equal(measured(x[torch.randperm(200, generator=g)]), expected)
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=g, dtype=torch.double)).Q
    rotated = measured(x @ rotation)
    assert rotated[:2] == pytest.approx(expected[:2], rel=1e-9)
    assert rotated[3:6] == pytest.approx(expected[3:6], rel=1e-2)
    principal = torch.linalg.eigh(torch.cov(x.T)).eigenvectors
    assert measured(x @ principal).correlation < 1e-9 < expected.correlation
    assert measured(x * 100 + 5)[:3] == pytest.approx(expected[:3], rel=1e-9)
    assert measured(x * 100).norm_mean == pytest.approx(100 * expected.norm_mean)
    stretched = measured(x * torch.logspace(-2, 2, 9).double())
    assert stretched.correlation == pytest.approx(expected.correlation, rel=1e-9)
    assert stretched.effective_dimension != pytest.approx(expected.effective_dimension, rel=0.01)


def test_what_does_not_vary():
    found = measured(torch.full((5, 3), 0.1))
    assert all(math.isnan(value) for value in found[:3])
    assert found.norm_mean == pytest.approx(0.1 * 3**0.5)
    assert all(math.isnan(value) for value in measured(torch.ones(1, 3))[:3])
    x = rows()
    with_constant = torch.cat([x, torch.full((200, 1), 1e4 / 3, dtype=torch.double)], dim=1)
    assert measured(*with_constant.split(9)).correlation == pytest.approx(
        measured(x).correlation, rel=1e-9
    )
    zeros = measured(torch.zeros(4, 3))
    assert (zeros.norm_mean, zeros.norm_median, zeros.norm_max) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float64(dtype):
    x = rows().to(dtype)
    assert_equal(measured(x), by_definition(x.double()))


def test_state_does_not_grow():
    spectrum = Spectrum()
    spectrum.update(rows(count=3))

    def numbers():
        parts = [*vars(spectrum).values(), *vars(spectrum.moments).values()]
        return sum(value.numel() for value in parts if torch.is_tensor(value))

    before = numbers()
    for _ in range(5):
        spectrum.update(rows(count=500))
    assert numbers() == before


def test_bad_input_names_the_argument_and_changes_nothing():
    spectrum = Spectrum()
    with pytest.raises(ValueError, match="rows: got none so far"):
        spectrum.result()
    spectrum.update(rows())
    kept = spectrum.result()
    for bad, error, message in (
        ([[1.0]], TypeError, "rows: got list"),
        (torch.ones(2, 9).long(), TypeError, "rows: got torch.int64"),
        (torch.ones(9), ValueError, r"rows: got shape \(9,\)"),
        (torch.ones(0, 9), ValueError, r"rows: got shape \(0, 9\)"),
        (torch.full((2, 9), math.nan), ValueError, "rows: got nan or infinite"),
        (torch.ones(2, 8), ValueError, "rows: got width 8, want that of the rows before, 9"),
    ):
        with pytest.raises(error, match=message):
            spectrum.update(bad)
    other = Spectrum()
    other.update(torch.ones(2, 8))
    with pytest.raises(ValueError, match="got widths 8 and 8"):
        spectrum.merge(other)
    assert spectrum.result() == kept
    with pytest.raises(ValueError, match=r"other: got above 1\.0"):
        spectrum.merge(Spectrum(above=1.0))
    with pytest.raises(ValueError, match="above: got 0"):
        Spectrum(above=0)
    with pytest.raises(ValueError, match="times: got nan"):
        Spectrum(times=math.nan)
    with pytest.raises(ValueError, match="y: got 3 rows, want as many as x has, 2"):
        Moments().update(torch.ones(2, 8), torch.ones(3, 8))
