import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pre_kernels.diagnostics import Spatial, contrast_ratio, similarity_map, spatial_contrast


def picture(rows=5, columns=7, images=3, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(images, rows * columns, width, generator=g) + 0.8, (rows, columns)


def per_pair(features, grid, radius):
    """The definition, one pair of patches at a time."""
    near, far = [], []
    for x in features.double():
        close, distant = [], []
        for i in range(len(x)):
            for j in range(i):
                (r, c), (s, d) = divmod(i, grid[1]), divmod(j, grid[1])
                similarity = F.cosine_similarity(x[i], x[j], dim=0).item()
                if abs(r - s) + abs(c - d) == 1:
                    close.append(similarity)
                if max(abs(r - s), abs(c - d)) > radius:
                    distant.append(similarity)
        near.append(sum(close) / len(close))
        far.append(sum(distant) / len(distant))
    near, far = sum(near) / len(near), sum(far) / len(far)
    return near, far, near / far


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_equals_the_definition_pair_by_pair(radius):
    features, grid = picture()
    assert spatial_contrast(features, grid, radius) == pytest.approx(
        per_pair(features, grid, radius), abs=1e-12
    )


def test_default_radius_is_a_quarter_of_the_shorter_side():
    features, grid = picture(rows=8, columns=9)
    assert spatial_contrast(features, grid) == spatial_contrast(features, grid, 2)
    features, grid = picture(rows=2, columns=9)
    assert spatial_contrast(features, grid) == spatial_contrast(features, grid, 1)


def test_known_answers():
    # Two halves that are 60 degrees apart, each of equal patches.
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 3**0.5 / 2])
    halves = torch.stack([a, a, b, b]).expand(4, 4, 2).reshape(16, 2)
    # 24 pairs share a side, and 4 of them cross the border. At radius 2, far pairs are in rows 0
    # and 3 (16 pairs of columns, of which 8 are within one half) or in columns 0 and 3 (16 pairs of
    # rows, of which 2 are in rows 0 and 3 too).
    near, far, ratio = spatial_contrast(halves, (4, 4), 2)
    assert near == pytest.approx((20 + 4 * 0.5) / 24)
    assert far == pytest.approx((8 + 8 * 0.5 + 14 * 0.5) / 30)
    assert ratio == pytest.approx(near / far)
    assert spatial_contrast(torch.ones(16, 3), (4, 4)) == pytest.approx((1.0, 1.0, 1.0))


def test_it_follows_structure():
    g = torch.Generator().manual_seed(0)
    objects = torch.randn(4, 32, generator=g) + 0.5
    label = torch.arange(4).view(2, 2).repeat_interleave(6, 0).repeat_interleave(6, 1).flatten()
    clean = objects[label] + 0.3 * torch.randn(144, 32, generator=g)
    spilled = clean + 2 * objects.mean(0)
    assert (
        spatial_contrast(clean, (12, 12)).ratio
        > 1.3 * spatial_contrast(spilled, (12, 12)).ratio
        > 1.3
    )


def test_invariances():
    features, grid = picture()
    expected = spatial_contrast(features, grid, 2)
    g = torch.Generator().manual_seed(1)
    assert spatial_contrast(
        features * (torch.rand(3, 35, 1, generator=g) + 0.1), grid, 2
    ) == pytest.approx(expected, rel=1e-5)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.double)).Q
    assert spatial_contrast(features.double() @ rotation, grid, 2) == pytest.approx(
        expected, rel=1e-9
    )
    images = features.unflatten(1, grid)
    assert spatial_contrast(images.flip(1).flatten(1, 2), grid, 2) == pytest.approx(
        expected, rel=1e-9
    )
    assert spatial_contrast(images.transpose(1, 2).flatten(1, 2), (7, 5), 2) == pytest.approx(
        expected, rel=1e-9
    )
    assert spatial_contrast(features.flip(0), grid, 2) == pytest.approx(expected, rel=1e-9)
    # The order of patches does matter, because it decides which patches are neighbours.
    angle = torch.linspace(0, math.pi / 2, 35)
    smooth = torch.stack([angle.cos(), angle.sin()], dim=1)
    shuffled = smooth[torch.randperm(35, generator=g)]
    assert spatial_contrast(smooth, grid).ratio > 1.2 * spatial_contrast(shuffled, grid).ratio


def test_a_stream_of_images_of_different_grids():
    first, second = picture(seed=1), picture(rows=4, columns=4, images=2, seed=2)
    one, other = Spatial(2), Spatial(2)
    one.update(*first)
    other.update(*second)
    one.merge(other)
    a, b = per_pair(*first, 2), per_pair(*second, 2)
    assert one.result().near == pytest.approx((3 * a[0] + 2 * b[0]) / 5)
    assert one.result().far == pytest.approx((3 * a[1] + 2 * b[1]) / 5)


def test_nothing_to_average_is_nan():
    assert all(map(math.isnan, spatial_contrast(torch.ones(1, 2), (1, 1))))
    near, far, ratio = spatial_contrast(torch.ones(4, 2), (2, 2))
    assert near == pytest.approx(1)
    assert math.isnan(far)
    assert math.isnan(ratio)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if torch.is_tensor(tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_no_patch_by_patch_matrix_is_made():
    features = torch.randn(2, 400, 5)
    masks = torch.eye(4).bool().repeat_interleave(100, 1).expand(2, -1, -1)
    with Largest() as largest:
        contrast_ratio(features, masks)
        spatial_contrast(features, (20, 20))
    assert 2 * 400 * 5 <= largest.numbers < 2 * 400 * 10


def test_similarity_map():
    features, grid = picture()
    similarities = similarity_map(features, 9)
    assert similarities.shape == (3, 35)
    assert similarities.dtype == torch.float32
    expected = F.cosine_similarity(features, features[:, 9:10], dim=-1)
    torch.testing.assert_close(similarities, expected)
    torch.testing.assert_close(similarity_map(features[1], 9, grid), expected[1].view(grid))
    torch.testing.assert_close(similarity_map(torch.stack([features, -features]), 9)[1], expected)
    order = torch.randperm(35)
    torch.testing.assert_close(
        similarity_map(features[:, order], order.tolist().index(9)), expected[:, order]
    )
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    torch.testing.assert_close(similarity_map(features @ rotation, 9), expected)
    assert similarity_map(torch.tensor([[0.0, 0], [1, 0]]), 0).tolist() == [0, 0]
    assert similarity_map(features.double(), 0).dtype == torch.float64


ONE = torch.ones(6, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spatial_contrast([[1.0]], (1, 1)), TypeError, "features: got list"),
        (
            lambda: spatial_contrast(torch.ones(0, 2), (1, 1)),
            ValueError,
            r"features: got shape \(1, 0, 2\)",
        ),
        (lambda: spatial_contrast(ONE * math.nan, (2, 3)), ValueError, "features: got nan"),
        (
            lambda: spatial_contrast(ONE, (2, 4)),
            ValueError,
            r"grid: got \(2, 4\), want .* product is 6",
        ),
        (lambda: spatial_contrast(ONE, 6), ValueError, "grid: got 6"),
        (lambda: spatial_contrast(ONE, (-2, -3)), ValueError, r"grid: got \(-2, -3\)"),
        (lambda: spatial_contrast(ONE, (2, 3), 0), ValueError, "radius: got 0"),
        (lambda: similarity_map(ONE, 6), ValueError, r"patch: got 6, want an integer in 0\.\.5"),
        (lambda: similarity_map(ONE, -1), ValueError, "patch: got -1"),
        (lambda: similarity_map(ONE, 1.0), ValueError, r"patch: got 1\.0"),
        (lambda: similarity_map(torch.ones(3), 0), ValueError, "features: got shape"),
        (lambda: similarity_map(ONE * math.inf, 0), ValueError, "features: got nan or infinite"),
        (lambda: similarity_map(ONE, 0, (3, 3)), ValueError, "grid: got"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
