"""Probes: how often a linear classifier, or the nearest neighbours, predict the label from
features."""

from __future__ import annotations

import torch
from torch import Tensor

from . import inputs

TEST_SIZE = 0.25


def linear_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor | None = None,
    test_labels: Tensor | None = None,
    *,
    test_size: float = TEST_SIZE,
    seed: int = 0,
    inverse_penalty: float = 1.0,
    max_iter: int = 300,
) -> float:
    """Test accuracy in 0..1 of a logistic regression on `features` (the linear probe of arXiv
    2603.20808).

    The paper probes the mean over an image's visual tokens, layer by layer. Pass such means, or
    means over objects. Features are standardised with the mean and standard deviation of the
    training part. The probe is then the solution of

        minimise  inverse_penalty · Σ -log softmax(W x + b)[label] + ½ |W|²

    found by L-BFGS in float64 on the device of `features`. With two classes, W and b of the first
    are 0. scikit-learn's StandardScaler and LogisticRegression have the same objective, and tests
    hold the accuracy to theirs within 0.5 points. Scaling, moving or reordering single features
    changes nothing (up to the solver's tolerance). A rotation changes the result, because of the
    standardisation. A test label that is not among the training labels counts as an error.

    ```python
    >>> labels = torch.arange(40) % 2
    >>> linear_probe(torch.randn(40, 8) + 10 * labels[:, None], labels)
    1.0

    ```

    Args:
        features: (N, width), floating point.
        labels: (N,), integer classes.
        test_features, test_labels: (M, width), (M,): accuracy is measured on these, and all of
            `features` is used for training. Pass them where rows are related (one object in two
            scenes). None: a part of `features`, split by class.
        test_size: the part of each class that is used for testing, between 0 and 1. Each class
            keeps at least one row in either part.
        seed: the seed of the split. Nothing else is random.
        inverse_penalty: scikit-learn's C.
        max_iter: the most iterations of the solver.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """
    if not inverse_penalty > 0:
        raise ValueError(f"inverse_penalty: got {inverse_penalty}, want a positive number")
    inputs.check_positive("max_iter", max_iter)
    x, y, test_x, test_y = _parts(features, labels, test_features, test_labels, test_size, seed)
    mean = x.mean(0)
    scale = x.std(0, correction=0)
    # Rounding gives a constant feature a tiny scale that is not 0. Dividing by it would blow up.
    scale = scale.where(scale > 1e-12 * mean.abs(), 1.0)
    classes, y = y.unique(return_inverse=True)
    weight = _fit((x - mean) / scale, y, len(classes), inverse_penalty, max_iter)
    predicted = classes[_scores(weight, (test_x - mean) / scale).argmax(1)]
    return _accuracy(predicted, test_y)


def knn_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor | None = None,
    test_labels: Tensor | None = None,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    test_size: float = TEST_SIZE,
    seed: int = 0,
) -> float:
    """Test accuracy in 0..1 of the weighted k nearest neighbours by cosine similarity (Wu et al.
    2018).

    For each test row, the `neighbours` most similar training rows vote for their class, each with
    weight exp(similarity / temperature). The class with the largest sum is the prediction. Nothing
    is fitted, so unlike the linear probe it asks whether the classes already lie together in the
    features. Scaling a row or rotating the feature space changes nothing. Moving the origin or
    scaling single features changes the result.

    Args:
        features, labels, test_features, test_labels, test_size, seed: as in `linear_probe`.
            Computed in float64, for at most 1,024 test rows at a time.
        neighbours: how many training rows vote. If there are fewer, all vote.
        temperature: the smaller it is, the more the nearest rows count.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """
    inputs.check_positive("neighbours", neighbours)
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, want a positive number")
    x, y, test_x, test_y = _parts(features, labels, test_features, test_labels, test_size, seed)
    classes, y = y.unique(return_inverse=True)
    x = inputs.unit(x)
    predicted = []
    for part in inputs.unit(test_x).split(1024):
        similarity, nearest = (part @ x.T).topk(min(neighbours, len(x)), dim=1)
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        predicted.append(
            votes.new_zeros(len(part), len(classes)).scatter_add_(1, y[nearest], votes).argmax(1)
        )
    return _accuracy(classes[torch.cat(predicted)], test_y)


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).double().mean())


def _parts(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor | None,
    test_labels: Tensor | None,
    test_size: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The training and test rows, checked, in float64 and int64 on the device of `features`."""
    x, y = _check("features", features, "labels", labels, features)
    if (test_features is None) != (test_labels is None):
        raise ValueError("test_features, test_labels: got only one of them, want both or neither")
    if not 0 < test_size < 1:
        raise ValueError(f"test_size: got {test_size}, want a fraction between 0 and 1")
    _, number, counts = y.unique(return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise ValueError("labels: got a single class, want at least two")
    if test_features is not None:
        test_x, test_y = _check("test_features", test_features, "test_labels", test_labels, x)
        if test_x.shape[1] != x.shape[1]:
            raise ValueError(
                f"test_features: got width {test_x.shape[1]}, want that of features, {x.shape[1]}"
            )
        return x, y, test_x, test_y
    if counts.min() < 2:
        raise ValueError(
            "labels: got a class with a single row, want at least two to split each class"
        )
    test = _split(number.cpu(), counts.cpu(), test_size, seed).to(x.device)
    return x[~test], y[~test], x[test], y[test]


def _split(number: Tensor, counts: Tensor, test_size: float, seed: int) -> Tensor:
    """Which rows are for testing, (N,) bool. `number` is the class of each row, `counts` the number
    of rows of each class."""
    order = torch.randperm(len(number), generator=torch.Generator().manual_seed(seed))
    # A stable sort by class keeps the random order within each class.
    order = order[number[order].argsort(stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    place -= (counts.cumsum(0) - counts)[number]
    return place < counts_in_test(counts, test_size)[number]


def counts_in_test(counts: Tensor, test_size: float = TEST_SIZE) -> Tensor:
    """How many rows of each class the probes test, if they are given no test rows.

    Args:
        counts: (classes,), integers: the rows of each class, at least two.
        test_size: as in `linear_probe`.

    Returns:
        (classes,), int64. The largest divided by the sum is the accuracy of a guess that always
        names the most frequent class.
    """
    return (counts * test_size).round().long().clamp(min=1).minimum(counts - 1)


def _fit(x: Tensor, y: Tensor, classes: int, inverse_penalty: float, max_iter: int) -> Tensor:
    """The weights, (outputs, width + 1), with the biases last. Two classes have one output: the
    score of the second class minus that of the first."""
    each = torch.arange(len(x), device=x.device)
    penalty = 1 / (inverse_penalty * len(x))
    weight = x.new_zeros(classes if classes > 2 else 1, x.shape[1] + 1)
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def loss() -> Tensor:
        logarithms = _scores(weight, x).log_softmax(1)
        # The gradient of the summed loss with respect to the scores.
        excess = logarithms.exp()
        excess[each, y] -= 1
        excess = excess[:, -len(weight) :]
        linear = weight[:, :-1]
        weight.grad = torch.cat(
            [excess.T @ x / len(x) + penalty * linear, excess.mean(0)[:, None]], dim=1
        )
        return -logarithms[each, y].mean() + penalty / 2 * linear.square().sum()

    solver.step(loss)
    return weight


def _scores(weight: Tensor, x: Tensor) -> Tensor:
    scores = x @ weight[:, :-1].T + weight[:, -1]
    return scores if len(weight) > 1 else torch.cat([torch.zeros_like(scores), scores], dim=1)


def _check(
    name: str, features: object, label_name: str, labels: object, like: Tensor
) -> tuple[Tensor, Tensor]:
    inputs.check_floating(name, features)
    if not torch.is_tensor(labels) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"{label_name}: got {inputs.describe(labels)}, want an integer tensor, a class for "
            f"each row ({label_name}.long() is one)"
        )
    inputs.check_rows(name, features)
    assert torch.is_tensor(features)
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"{label_name}: got shape {tuple(labels.shape)}, want ({len(features)},), one for each "
            f"row of {name}"
        )
    return features.detach().to(like.device, torch.float64), labels.detach().to(
        like.device, torch.int64
    )
