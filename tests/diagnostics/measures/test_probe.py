import math

import pytest
import torch

from pre_kernels.diagnostics import knn_probe, linear_probe
from pre_kernels.diagnostics.measures.probe import _fit


def blobs(count=300, width=6, classes=3, gap=8.0, seed=0):
    """Gaussian blobs. Each centre is `gap` standard deviations from the origin, along an axis of
    its own."""
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
    # The label is the exclusive or of two signs. The features have it, but no line separates it.
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, generator=g)
    assert linear_probe(x, (x[:, 0] * x[:, 1] > 0).long()) < 0.6
    assert linear_probe(x, (x[:, 0] > 0).long()) > 0.97


def test_accuracy_of_two_gaussians_is_the_known_one():
    # With centres at ±1 and unit variance, the best classifier is right with probability Φ(1).
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40_000) % 2
    x = torch.randn(40_000, 1, generator=g) + (2.0 * labels - 1)[:, None]
    assert linear_probe(x, labels) == pytest.approx(
        0.5 * (1 + math.erf(1 / math.sqrt(2))), abs=0.01
    )


def test_invariances():
    features, labels = blobs(gap=1.0)
    expected = linear_probe(features, labels)
    assert 0.4 < expected < 0.95
    assert linear_probe(
        features * torch.tensor([1e-3, 1e3, 1, 5, 7, 9]) + 3, labels
    ) == pytest.approx(expected, abs=0.02)
    assert linear_probe(features[:, torch.randperm(6)], labels) == pytest.approx(expected, abs=0.02)
    assert linear_probe(features.bfloat16(), labels) == pytest.approx(expected, abs=0.03)


def test_same_seed_same_split():
    features, labels = blobs(gap=0.7)
    assert linear_probe(features, labels, seed=3) == linear_probe(features, labels, seed=3)
    assert len({linear_probe(features, labels, seed=s) for s in range(5)}) > 1


def test_accuracy_is_that_of_the_test_part():
    # With more columns than rows, any labels can be memorised.
    g = torch.Generator().manual_seed(0)
    features = torch.randn(100, 300, generator=g)
    labels = torch.randint(2, (100,), generator=g)
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


def clouds(count, width, classes, gap, seed=0):
    """Overlapping classes. One feature is constant, others differ in scale, and none is centred."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    features = (
        torch.randn(count, width, generator=g)
        + gap * torch.randn(classes, width, generator=g)[labels]
    )
    features *= torch.logspace(-3, 3, width)
    features[:, 1] = 0.1
    return features + 5, labels * 3 - 7  # labels are names, not numbers


@pytest.mark.parametrize(
    ("rows", "width", "classes", "gap"),
    [(600, 32, 2, 0.1), (600, 32, 10, 0.5), (300, 200, 3, 0.2), (90, 300, 4, 0.15)],
)
@pytest.mark.parametrize("inverse_penalty", [0.01, 1.0])
def test_it_is_scikit_learns(rows, width, classes, gap, inverse_penalty):
    linear_model = pytest.importorskip("sklearn.linear_model")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = clouds(rows + 3000, width, classes, gap)
    x, y, test_x, test_y = features[:rows], labels[:rows], features[rows:], labels[rows:]
    expected = {}
    for tol in (1e-4, 1e-8):  # as it comes, and nearly solved
        model = linear_model.LogisticRegression(C=inverse_penalty, max_iter=1000, tol=tol)
        model = make_pipeline(StandardScaler(), model).fit(x.double().numpy(), y.numpy())
        expected[tol] = model.score(test_x.double().numpy(), test_y.numpy())
    assert 1.1 / classes < expected[1e-8] < 0.98
    accuracy = linear_probe(x, y, test_x, test_y, inverse_penalty=inverse_penalty)
    assert accuracy == pytest.approx(expected[1e-4], abs=0.005)
    assert accuracy == pytest.approx(expected[1e-8], abs=0.001)


@pytest.mark.parametrize("classes", [2, 3])
def test_its_weights_are_scikit_learns(classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 5, generator=g, dtype=torch.double)
    y = torch.randint(classes, (100,), generator=g)
    model = linear_model.LogisticRegression(C=0.1, tol=1e-9, max_iter=1000).fit(
        x.numpy(), y.numpy()
    )
    weight = _fit(x, y, classes, inverse_penalty=0.1, max_iter=300)
    torch.testing.assert_close(weight[:, :-1], torch.from_numpy(model.coef_), rtol=1e-4, atol=1e-5)
    bias = torch.from_numpy(model.intercept_)  # several classes: unique up to a constant
    torch.testing.assert_close(weight[:, -1] - weight[0, -1], bias - bias[0], rtol=1e-4, atol=1e-5)
    if classes == 2:
        torch.testing.assert_close(weight[:, -1], bias, rtol=1e-4, atol=1e-5)


def test_inference_mode():
    expected = linear_probe(*blobs(gap=1.0))
    with torch.inference_mode():
        assert linear_probe(*blobs(gap=1.0)) == expected


def test_the_split_takes_a_part_of_every_class():
    # A class whose rows are all equal is found if both parts have one of them.
    labels = torch.tensor([0] * 40 + [1] * 2 + [2] * 10)
    for seed in range(5):
        for test_size in (0.1, 0.25, 0.9):
            options = {"test_size": test_size, "seed": seed}
            assert (
                linear_probe(torch.eye(3)[labels], labels, inverse_penalty=100.0, **options) == 1.0
            )
            assert knn_probe(torch.eye(3)[labels], labels, neighbours=1, **options) == 1.0


def knn_per_pair(x, y, test_x, test_y, neighbours, temperature):
    """The definition, one test row at a time."""
    right = 0
    for row, label in zip(test_x.double(), test_y.tolist(), strict=True):
        similarity = [
            torch.nn.functional.cosine_similarity(row, other, dim=0).item() for other in x.double()
        ]
        nearest = sorted(range(len(x)), key=lambda i: -similarity[i])[:neighbours]
        votes = {}
        for i in nearest:
            votes[int(y[i])] = votes.get(int(y[i]), 0) + math.exp(similarity[i] / temperature)
        right += max(votes, key=votes.get) == label
    return right / len(test_y)


@pytest.mark.parametrize(
    ("neighbours", "temperature"), [(1, 0.07), (5, 0.07), (5, 10.0), (1000, 0.2)]
)
def test_knn_equals_the_definition(neighbours, temperature):
    x, y = blobs(count=60, gap=1.0)
    test_x, test_y = blobs(count=50, gap=1.0, seed=1)
    expected = knn_per_pair(x, y, test_x, test_y, neighbours, temperature)
    assert 0.34 < expected < 0.95
    assert (
        knn_probe(x, y, test_x, test_y, neighbours=neighbours, temperature=temperature) == expected
    )


def test_knn_known_answers():
    assert knn_probe(*blobs()) == 1.0
    # No line separates the exclusive or of two signs, but neighbours agree on it.
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    assert knn_probe(x, (x[:, 0] * x[:, 1] > 0).long()) > 0.97
    # One near row outvotes two far ones at a low temperature, and not at a high one.
    x, y = torch.tensor([[1.0, 0], [0, 1], [0, 1]]), torch.tensor([0, 1, 1])
    near = torch.tensor([[2.0, 1.0]]), torch.tensor([0])
    assert knn_probe(x, y, *near, temperature=0.07) == 1.0
    assert knn_probe(x, y, *near, temperature=10.0) == 0.0


def test_knn_invariances():
    x, y = blobs(gap=1.0)
    expected = knn_probe(x, y)
    g = torch.Generator().manual_seed(1)
    assert knn_probe(x * (torch.rand(300, 1, generator=g) + 0.1), y) == pytest.approx(
        expected, abs=0.01
    )
    assert knn_probe(x @ torch.linalg.qr(torch.randn(6, 6, generator=g)).Q, y) == pytest.approx(
        expected, abs=0.01
    )
    assert abs(knn_probe(x + 50 * torch.eye(6)[5], y) - expected) > 0.1


def test_knn_bad_input_names_the_argument():
    x, y = blobs()
    for change, message in (
        ({"neighbours": 0}, "neighbours: got 0"),
        ({"temperature": 0.0}, r"temperature: got 0\.0"),
        ({"features": torch.full((300, 6), math.nan)}, "features: got nan"),
        ({"features": x[:0], "labels": y[:0]}, r"features: got shape \(0, 6\)"),
        ({"labels": torch.ones(300).long()}, "labels: got a single class"),
        ({"labels": torch.arange(300)}, "labels: got a class with a single row"),
    ):
        with pytest.raises(ValueError, match=message):
            knn_probe(**({"features": x, "labels": y} | change))


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
        (
            {"labels": torch.arange(300).clamp(max=5)},
            ValueError,
            "labels: got a class with a single row",
        ),
        (
            {"test_features": torch.ones(3, 6)},
            ValueError,
            "test_features, test_labels: got only one",
        ),
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
        ({"max_iter": 0}, ValueError, "max_iter: got 0"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    features, labels = blobs()
    with pytest.raises(error, match=message):
        linear_probe(**({"features": features, "labels": labels} | change))
