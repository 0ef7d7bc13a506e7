import math

import pytest
import torch

from pre_kernels.diagnostics import linear_probe


def blobs(count=300, width=6, classes=3, gap=8.0, seed=0):
    """Gaussian blobs whose centres lie `gap` standard deviations from the origin, along one axis each."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return torch.randn(count, width, generator=g) + gap * torch.eye(classes, width)[labels], labels


def test_separable_classes_are_read_perfectly():
    assert linear_probe(*blobs()) == 1.0
    assert linear_probe(*blobs(seed=1), *blobs(seed=2)) == 1.0


def test_features_without_the_label_give_chance():
    features, _ = blobs(count=3000, gap=0.0)
    labels = torch.randint(3, (3000,), generator=torch.Generator().manual_seed(1))
    assert linear_probe(features, labels) == pytest.approx(1 / 3, abs=0.06)


def test_it_is_linear():
    # the exclusive or of two signs is in the features, but no line separates it
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, generator=g)
    assert linear_probe(x, (x[:, 0] * x[:, 1] > 0).long()) < 0.6
    assert linear_probe(x, (x[:, 0] > 0).long()) > 0.97


def test_accuracy_of_two_gaussians_is_the_known_one():
    # centres at ±1 of unit variance: the best classifier is right with probability Φ(1)
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40_000) % 2
    x = torch.randn(40_000, 1, generator=g) + (2.0 * labels - 1)[:, None]
    assert linear_probe(x, labels) == pytest.approx(0.5 * (1 + math.erf(1 / math.sqrt(2))), abs=0.01)


def test_invariances():
    features, labels = blobs(gap=1.0)
    expected = linear_probe(features, labels)
    assert 0.4 < expected < 0.95
    assert linear_probe(features * torch.tensor([1e-3, 1e3, 1, 5, 7, 9]) + 3, labels) == pytest.approx(
        expected, abs=0.02
    )
    assert linear_probe(features[:, torch.randperm(6)], labels) == pytest.approx(expected, abs=0.02)
    assert linear_probe(features.bfloat16(), labels) == pytest.approx(expected, abs=0.03)


def test_same_seed_same_split():
    features, labels = blobs(gap=0.7)
    assert linear_probe(features, labels, seed=3) == linear_probe(features, labels, seed=3)
    assert len({linear_probe(features, labels, seed=s) for s in range(5)}) > 1


def test_accuracy_is_that_of_the_test_part():
    # with more columns than rows any labels are learned by heart
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(100, 300, generator=g), torch.randint(2, (100,), generator=g)
    assert linear_probe(features, labels, features, labels) == 1.0
    assert linear_probe(features, labels) < 0.8
    assert linear_probe(features, labels, features, 1 - labels) == 0.0


def test_does_not_need_gradients_or_change_its_input():
    features, labels = blobs()
    features.requires_grad_()
    kept = features.detach().clone()
    linear_probe(features, labels)
    assert features.grad is None
    assert torch.equal(features, kept)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": [[1.0]]}, TypeError, "features: got list"),
        ({"features": torch.ones(300, 6).long()}, TypeError, "features: got torch.int64"),
        ({"features": torch.ones(300)}, ValueError, r"features: got shape \(300,\)"),
        ({"features": torch.full((300, 6), math.inf)}, ValueError, "features: got nan or infinite"),
        ({"labels": torch.ones(300)}, TypeError, "labels: got torch.float32"),
        ({"labels": torch.ones(7).long()}, ValueError, r"labels: got shape \(7,\), want \(300,\)"),
        ({"labels": torch.ones(300).long()}, ValueError, "labels: got a single class"),
        ({"labels": torch.arange(300).clamp(max=5)}, ValueError, "labels: got a class with a single row"),
        ({"test_features": torch.ones(3, 6)}, ValueError, "test_features, test_labels: got only one"),
        (
            {"test_features": torch.ones(3, 5), "test_labels": torch.ones(3).long()},
            ValueError,
            "test_features: got width 5",
        ),
        (
            {"test_features": torch.ones(3, 6), "test_labels": torch.ones(2).long()},
            ValueError,
            "test_labels: got shape",
        ),
        ({"test_size": 1.5}, ValueError, "test_size: got 1.5"),
        ({"inverse_penalty": 0.0}, ValueError, "inverse_penalty: got 0.0"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    features, labels = blobs()
    with pytest.raises(error, match=message):
        linear_probe(**({"features": features, "labels": labels} | change))
