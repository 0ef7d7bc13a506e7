"""The columns of a report: the title, definition and needed input of each metric that is shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Column(NamedTuple):
    """How a metric of `LayerReport.rows()` is shown.

    Attributes:
        name: the metric's key in a row.
        title: what people read.
        axis: the label of the y axis.
        formula: how the metric is defined.
        needs: the input without which it cannot be measured.
        digits: how many are printed after the point.
        scale: of the y axis, as matplotlib names it.
        in_unit_interval: whether the metric is in 0..1 by definition.
    """

    name: str
    title: str
    axis: str
    formula: str
    needs: str
    digits: int = 3
    scale: str = "linear"
    in_unit_interval: bool = False


_ALL = (
    Column(
        "linear_probe",
        "Linear probe",
        "test accuracy",
        "share of test items whose class a logistic regression reads from mean-pooled visual "
        "tokens (arXiv 2603.20808)",
        "labels, a class for each image",
        in_unit_interval=True,
    ),
    Column(
        "knn_probe",
        "k-NN probe",
        "test accuracy",
        "the same share for a vote of the nearest neighbours, weighted by exp(cosine / 0.07) (Wu "
        "et al. 2018)",
        "labels, a class for each image",
        in_unit_interval=True,
    ),
    Column(
        "contrast",
        "Semantic contrast ratio",
        "cohesion ÷ coupling",
        "cohesion ÷ coupling; at 1 object borders leave no trace (arXiv 2603.20808)",
        "masks, the patches of each object",
    ),
    Column(
        "cohesion",
        "Cohesion",
        "mean cosine",
        "mean cosine similarity of two patches of one object",
        "masks, the patches of each object",
    ),
    Column(
        "coupling",
        "Coupling",
        "mean cosine",
        "mean cosine similarity of patches of two objects of one image",
        "masks, the patches of each object",
    ),
    Column(
        "spatial_contrast",
        "Spatial contrast",
        "near ÷ far",
        "mean cosine similarity of patches that share a side ÷ that of patches more than a quarter "
        "of the image's side apart: what stands in for the semantic contrast ratio without masks, "
        "not a value of it",
        "the grid of the patches",
    ),
    Column(
        "cosine",
        "Cosine with the anchor",
        "mean cosine",
        "mean over visual tokens of cos(hidden state, anchor): what L_PRe is the negative of, "
        "without its predictor",
        "an anchor as wide as the layer",
    ),
    Column(
        "cka_debiased",
        "CKA with the anchor, debiased",
        "CKA",
        "HSIC(x, y) ÷ √(HSIC(x, x) · HSIC(y, y)) of linear kernels, HSIC unbiased (Kornblith et "
        "al. 2019, Song et al. 2012); about 0 for independent features",
        "at least 4 visual tokens and the metric “cka”",
    ),
    Column(
        "cknna",
        "CKNNA with the anchor",
        "CKNNA",
        "CKA over pairs of tokens that are nearest neighbours in both spaces, on a sample of "
        "tokens (Huh et al. 2024)",
        "more visual tokens than neighbours and the metric “cknna”",
    ),
    Column(
        "effective_dimension",
        "Effective dimension",
        "directions",
        "(Σ λ)² ÷ Σ λ², λ the eigenvalues of the tokens' covariance (participation ratio, arXiv "
        "2603.20808)",
        "tokens that differ and the metric “spectrum”",
        digits=1,
    ),
    Column(
        "components_90",
        "90 %-variance components",
        "components",
        "the least number of eigenvalues of the covariance that make 90 % of their sum",
        "tokens that differ and the metric “spectrum”",
        digits=1,
    ),
    Column(
        "correlation",
        "Mean |correlation| of features",
        "mean |correlation|",
        "mean over pairs of features i ≠ j of |C_ij| ÷ √(C_ii C_jj), C the tokens' covariance "
        "(arXiv 2603.20808)",
        "tokens that differ and the metric “spectrum”",
        in_unit_interval=True,
    ),
    Column(
        "norm_mean",
        "Norm of the tokens",
        "mean norm",
        "mean over visual tokens of the Euclidean norm of the hidden state, in its own unit",
        "the metric “spectrum”",
        scale="log",
    ),
    Column(
        "massive_tokens",
        "Tokens with massive activations",
        "share of tokens",
        "share of tokens with a number above 100 and 1,000 times the median of the token (Sun et "
        "al. 2024)",
        "the metric “spectrum”",
        in_unit_interval=True,
    ),
    Column(
        "lens_share",
        "Logit lens",
        "share of tokens",
        "share of tokens that the model's own head decodes to one of the few most frequent ones "
        "(nostalgebraist 2020)",
        "logits, the model's final norm and unembedding",
        in_unit_interval=True,
    ),
)
COLUMNS: dict[str, Column] = {column.name: column for column in _ALL}


def by_layer(runs: Iterable[Iterable[Row]], metric: str) -> dict[int, list[float]]:
    """The values of a metric by layer, in order: one for each run that has it. Layers without any
    are left out."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for row in run:
            value = row.get(metric)
            if value is not None and math.isfinite(value):
                values.setdefault(row["layer"], []).append(value)
    return dict(sorted(values.items()))


def measured_columns(models: Iterable[Mapping[str, Any]]) -> list[Column]:
    """Those of `COLUMNS` whose metric was measured for at least one model."""
    models = list(models)
    return [
        column for column in _ALL if any(by_layer(model["runs"], column.name) for model in models)
    ]
