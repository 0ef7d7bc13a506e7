import math

import pytest
import torch
import torch.nn.functional as F

from pre_kernels.diagnostics import Contrast, contrast_ratio


def scene(seed=0, images=4, patches=11, width=7):
    """Random features with objects of 1 to 4 patches, an absent object, and background."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(images, patches, width, generator=g) + 0.8
    masks = torch.zeros(images, 4, patches, dtype=torch.bool)
    for image in range(images):
        order = torch.randperm(patches, generator=g)
        for k, part in enumerate(order[:8].split([4, 3, 1])):
            masks[image, k, part] = True
    masks[0, 1] = False
    return features, masks


def per_pair(features, masks):
    """The definition, one pair of patches at a time."""
    within, between = [], []
    for x, objects in zip(features.double(), masks, strict=True):
        patches = [mask.nonzero().flatten().tolist() for mask in objects]

        def similar(i, j, x=x):
            return F.cosine_similarity(x[i], x[j], dim=0).item()

        for a in patches:
            pairs = [similar(i, j) for i in a for j in a if i != j]
            if pairs:
                within.append(sum(pairs) / len(pairs))
        for k, a in enumerate(patches):
            for b in patches[k + 1 :]:
                pairs = [similar(i, j) for i in a for j in b]
                if pairs:
                    between.append(sum(pairs) / len(pairs))
    cohesion, coupling = sum(within) / len(within), sum(between) / len(between)
    return cohesion, coupling, cohesion / coupling


def test_equals_the_definition_pair_by_pair():
    features, masks = scene()
    assert contrast_ratio(features, masks) == pytest.approx(per_pair(features, masks), abs=1e-12)


def test_known_answers():
    # Two objects that are 60 degrees apart, each of two equal patches.
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 3**0.5 / 2])
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    assert contrast_ratio(torch.stack([a, a, b, b]), masks) == pytest.approx((1.0, 0.5, 2.0))
    # All patches are equal, so borders leave no trace.
    assert contrast_ratio(torch.ones(4, 3), masks) == pytest.approx((1.0, 1.0, 1.0))
    # The two patches of one object are at right angles, and the other object equals one of them.
    assert contrast_ratio(torch.stack([a, torch.tensor([0.0, 1.0]), a, a]), masks) == pytest.approx(
        (0.5, 0.5, 1.0)
    )


def test_objects_count_alike_whatever_their_size():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    features = torch.stack([a, a, a, a, a, b])
    masks = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    assert contrast_ratio(features, masks).cohesion == pytest.approx((1 + 0) / 2)


def test_invariances():
    features, masks = scene()
    expected = contrast_ratio(features, masks)
    g = torch.Generator().manual_seed(1)
    scale = torch.rand(*features.shape[:2], 1, generator=g) * 10 + 0.1
    assert contrast_ratio(features * scale, masks) == pytest.approx(expected, rel=1e-5)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=g, dtype=torch.double)).Q
    assert contrast_ratio(features.double() @ rotation, masks) == pytest.approx(expected, rel=1e-9)
    order = torch.randperm(features.shape[1], generator=g)
    assert contrast_ratio(features[:, order], masks[:, :, order]) == pytest.approx(
        expected, rel=1e-9
    )
    objects, images = torch.randperm(4, generator=g), torch.randperm(4, generator=g)
    assert contrast_ratio(features[images], masks[images][:, objects]) == pytest.approx(
        expected, rel=1e-9
    )


def test_background_and_padding_change_nothing():
    features, masks = scene()
    expected = contrast_ratio(features, masks)
    changed = features.clone()
    changed[~masks.any(1)] = 100.0
    assert contrast_ratio(changed, masks) == pytest.approx(expected, rel=1e-12)
    assert contrast_ratio(features, F.pad(masks, (0, 0, 0, 3))) == pytest.approx(
        expected, rel=1e-12
    )


def test_a_stream_of_images():
    features, masks = scene()
    whole = contrast_ratio(features, masks)
    one, other = Contrast(), Contrast()
    one.update(features[:1], masks[:1])
    for image in (1, 2, 3):
        other.update(features[image], masks[image])
    one.merge(other)
    assert one.result() == pytest.approx(whole, abs=1e-12)
    with pytest.raises(ValueError, match="masks: got shape"):
        one.update(features, masks[:, :, :5])
    assert one.result() == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_sizes(size):
    features, masks = scene()
    assert contrast_ratio(features * size, masks) == pytest.approx(
        contrast_ratio(features, masks), rel=1e-5
    )
    assert contrast_ratio(features.double() * size**10, masks) == pytest.approx(
        contrast_ratio(features, masks), rel=1e-5
    )


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 6e4), (torch.float32, 3e38), (torch.float64, 1e308)]
)
def test_finite_features_whose_sum_is_not(dtype, size):
    masks = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    features = torch.full((3, 40), size, dtype=dtype)
    assert contrast_ratio(features, masks) == pytest.approx((1.0, 1.0, 1.0))
    for bad in (math.nan, math.inf):
        features[1, 7] = bad
        with pytest.raises(ValueError, match="features: got nan or infinite"):
            contrast_ratio(features, masks)
    features[1, 7], features[2, 3] = math.inf, -math.inf
    with pytest.raises(ValueError, match="features: got nan or infinite"):
        contrast_ratio(features, masks)


def test_zero_patches_are_similar_to_nothing():
    masks = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    assert contrast_ratio(torch.tensor([[1.0, 0], [0, 0], [1, 0]]), masks) == pytest.approx(
        (0.0, 0.5, 0.0)
    )


def test_nothing_to_average_is_nan():
    one = torch.tensor([[1, 1, 0]]).bool()
    found = contrast_ratio(torch.ones(3, 2), one)
    assert found.cohesion == pytest.approx(1)
    assert math.isnan(found.coupling)
    assert math.isnan(found.ratio)
    opposite = torch.tensor([[1.0, 0], [1, 0], [-1, 0]])
    found = contrast_ratio(opposite, torch.tensor([[1, 1, 0], [0, 0, 1]]).bool())
    assert found.coupling == pytest.approx(-1)
    assert math.isnan(found.ratio)


@pytest.mark.parametrize(
    ("features", "masks", "error", "message"),
    [
        ([[1.0]], torch.ones(1, 1, dtype=torch.bool), TypeError, "features: got list"),
        (
            torch.ones(3, 2).long(),
            torch.ones(1, 3, dtype=torch.bool),
            TypeError,
            "features: got torch.int64",
        ),
        (torch.ones(3, 2), torch.ones(1, 3), TypeError, "masks: got torch.float32"),
        (torch.ones(3), torch.ones(1, 3, dtype=torch.bool), ValueError, "features: got shape"),
        (
            torch.ones(3, 2),
            torch.ones(1, 4, dtype=torch.bool),
            ValueError,
            r"masks: got shape \(1, 1, 4\)",
        ),
        (
            torch.ones(2, 3, 2),
            torch.ones(1, 1, 3, dtype=torch.bool),
            ValueError,
            "masks: got shape",
        ),
        (
            torch.ones(3, 2),
            torch.ones(2, 3, dtype=torch.bool),
            ValueError,
            "masks: some patches belong to more",
        ),
        (
            torch.full((3, 2), math.nan),
            torch.ones(1, 3, dtype=torch.bool),
            ValueError,
            "features: got nan",
        ),
        (torch.ones(0, 2), torch.ones(1, 0, dtype=torch.bool), ValueError, "features: got shape"),
    ],
)
def test_bad_input_names_the_argument(features, masks, error, message):
    with pytest.raises(error, match=message):
        contrast_ratio(features, masks)
