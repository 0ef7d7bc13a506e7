"""Linear probing: how much of a label a linear classifier reads from features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def linear_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor | None = None,
    test_labels: Tensor | None = None,
    *,
    test_size: float = 0.25,
    seed: int = 0,
    inverse_penalty: float = 1.0,
    max_iter: int = 300,
) -> float:
    """Test accuracy in 0..1 of a logistic regression on `features` (the linear probe of arXiv 2603.20808).

    The paper probes the mean over an image's visual tokens, layer by layer; pass such means, or those over objects.
    Features are standardised with the training part's mean and standard deviation, then

        minimise  inverse_penalty · Σ -log softmax(W x + b)[label] + ½ |W|²      (scikit-learn's LogisticRegression)

    Args:
        features: (N, width), floating point.
        labels: (N,), integer classes.
        test_features, test_labels: (M, width), (M,): what accuracy is measured on, and `features` is all trained on.
            Pass them where rows are related (one object in two scenes). None: a part of `features`, split by class.
        test_size: that part, between 0 and 1.
        seed: of the split; nothing else is random.
        inverse_penalty: scikit-learn's C.
        max_iter: of the solver.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted.
        ImportError: without scikit-learn, which the core does not depend on.
    """
    train = _check("features", features, "labels", labels)
    if (test_features is None) != (test_labels is None):
        raise ValueError("test_features, test_labels: got only one of them, want both or neither")
    if not 0 < test_size < 1:
        raise ValueError(f"test_size: got {test_size}, want a fraction between 0 and 1")
    if not inverse_penalty > 0:
        raise ValueError(f"inverse_penalty: got {inverse_penalty}, want a positive number")
    if len(np.unique(train[1])) < 2:
        raise ValueError("labels: got a single class, want at least two")

    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if test_features is None:
        if np.unique(train[1], return_counts=True)[1].min() < 2:
            raise ValueError("labels: got a class with a single row, want at least two to split each class")
        x, test_x, y, test_y = train_test_split(*train, test_size=test_size, random_state=seed, stratify=train[1])
    else:
        x, y = train
        test_x, test_y = _check("test_features", test_features, "test_labels", test_labels)
        if test_x.shape[1] != x.shape[1]:
            raise ValueError(f"test_features: got width {test_x.shape[1]}, want that of features, {x.shape[1]}")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=max_iter))
    return float(probe.fit(x, y).score(test_x, test_y))


def _check(name: str, features: Any, label_name: str, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    if not torch.is_tensor(features) or not features.is_floating_point():
        raise TypeError(f"{name}: got {_describe(features)}, want a floating point tensor")
    if not torch.is_tensor(labels) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{label_name}: got {_describe(labels)}, want an integer tensor")
    if features.dim() != 2 or len(features) == 0:
        raise ValueError(f"{name}: got shape {tuple(features.shape)}, want (N, width) with N > 0")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{label_name}: got shape {tuple(labels.shape)}, want ({len(features)},) as {name} has rows")
    if not features.isfinite().all():
        raise ValueError(f"{name}: got nan or infinite values, want finite ones")
    return features.detach().double().cpu().numpy(), labels.detach().cpu().numpy()


def _describe(value: object) -> str:
    return str(value.dtype) if torch.is_tensor(value) else type(value).__name__
