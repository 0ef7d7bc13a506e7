"""The columns of a report: title, definition and required input of each metric that is shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Column(NamedTuple):
    """How a metric of `LayerReport.rows()` is shown.

    Attributes:
        name: the key of the metric in a row.
        title: the heading that people read.
        axis: the label of the y axis.
        formula: the definition of the metric.
        needs: the input without which it cannot be measured.
        digits: how many digits are printed after the decimal point.
        scale: the scale of the y axis, as matplotlib names it.
        in_unit_interval: whether the metric is in 0..1 by definition.
        better: which values are better, "higher" or "lower". Empty: neither is.
    """

    name: str
    title: str
    axis: str
    formula: str
    needs: str
    digits: int = 3
    scale: str = "linear"
    in_unit_interval: bool = False
    better: str = ""

    @property
    def arrow(self) -> str:
        """The direction of better values as a mark behind the title, or nothing."""
        return ARROWS[self.better]

    @property
    def direction(self) -> str:
        """The direction of better values in words."""
        return f"{self.better} is better" if self.better else "neither higher nor lower is better"


ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
PROBES = ("linear_probe", "knn_probe")
# The main metrics, which are described in words.
MAIN = ("linear_probe", "contrast", "effective_dimension", "cosine")
# For a metric that was not measured, the one that is shown in its place.
STAND_INS = {"contrast": "spatial_contrast"}

_ALL = (
    Column(
        "linear_probe",
        "Linear probe",
        "test accuracy",
        "share of test images whose class a logistic regression predicts from the mean of their "
        "visual tokens (arXiv 2603.20808)",
        "labels, a class for each image",
        in_unit_interval=True,
        better="higher",
    ),
    Column(
        "knn_probe",
        "k-NN probe",
        "test accuracy",
        "the same share when the nearest training images vote, weighted by exp(cosine / 0.07) (Wu "
        "et al. 2018)",
        "labels, a class for each image",
        in_unit_interval=True,
        better="higher",
    ),
    Column(
        "contrast",
        "Semantic contrast ratio",
        "cohesion ÷ coupling",
        "how much more alike two patches of one object are than patches of two: cohesion ÷ "
        "coupling, at 1 equally alike (arXiv 2603.20808)",
        "masks, the patches of each object",
        better="higher",
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
        "mean cosine similarity of patches of two different objects of one image",
        "masks, the patches of each object",
    ),
    Column(
        "spatial_contrast",
        "Spatial contrast",
        "near ÷ far",
        "mean cosine similarity of patches that share a side ÷ that of patches more than a quarter "
        "of the image's shorter side apart; a substitute for the semantic contrast ratio without "
        "masks, with other values",
        "the grid of the patches",
        better="higher",
    ),
    Column(
        "cosine",
        "Cosine with the anchor",
        "mean cosine",
        "mean over visual tokens of cos(hidden state, anchor); without a predictor, L_PRe is the "
        "negative of this",
        "an anchor as wide as the layer",
        better="higher",
    ),
    Column(
        "cka_debiased",
        "CKA with the anchor, debiased",
        "CKA",
        "HSIC(x, y) ÷ √(HSIC(x, x) · HSIC(y, y)) of linear kernels, HSIC unbiased (Kornblith et "
        "al. 2019, Song et al. 2012); about 0 for independent features",
        "at least 4 visual tokens and the metric “cka”",
        better="higher",
    ),
    Column(
        "cknna",
        "CKNNA with the anchor",
        "CKNNA",
        "CKA over pairs of tokens that are nearest neighbours in both spaces, on a sample of "
        "tokens (Huh et al. 2024)",
        "more visual tokens than neighbours and the metric “cknna”",
        better="higher",
    ),
    Column(
        "effective_dimension",
        "Effective dimension",
        "directions",
        "in how many directions the tokens vary: (Σ λ)² ÷ Σ λ² with λ the eigenvalues of their "
        "covariance (participation ratio, arXiv 2603.20808)",
        "tokens that differ and the metric “spectrum”",
        digits=1,
        better="higher",
    ),
    Column(
        "components_90",
        "90 %-variance components",
        "components",
        "the smallest number of eigenvalues of the covariance that make up 90 % of their sum",
        "tokens that differ and the metric “spectrum”",
        digits=1,
        better="higher",
    ),
    Column(
        "correlation",
        "Mean |correlation| of features",
        "mean |correlation|",
        "mean over pairs of features i ≠ j of |C_ij| ÷ √(C_ii C_jj) with C the tokens' covariance "
        "(arXiv 2603.20808)",
        "tokens that differ and the metric “spectrum”",
        in_unit_interval=True,
        better="lower",
    ),
    Column(
        "norm_mean",
        "Norm of the tokens",
        "mean norm",
        "mean over visual tokens of the Euclidean norm of the hidden state, in the unit of the "
        "hidden state",
        "the metric “spectrum”",
        scale="log",
    ),
    Column(
        "massive_tokens",
        "Tokens with massive activations",
        "share of tokens",
        "share of tokens with a number whose magnitude is above 100 and at least 1,000 times the "
        "median of the token (Sun et al. 2024)",
        "the metric “spectrum”",
        in_unit_interval=True,
    ),
    Column(
        "lens_share",
        "Logit lens",
        "share of tokens",
        "share of visual tokens that the model's own head decodes to one of the few most frequent "
        "vocabulary tokens (nostalgebraist 2020)",
        "logits, the model's final norm and unembedding",
        in_unit_interval=True,
        better="lower",
    ),
)
COLUMNS: dict[str, Column] = {column.name: column for column in _ALL}


def by_layer(runs: Iterable[Iterable[Row]], metric: str) -> dict[int, list[float]]:
    """The values of a metric by layer, in order, one for each run that has it. Layers without a
    value are left out."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for row in run:
            value = row.get(metric)
            if value is not None and math.isfinite(value):
                values.setdefault(row["layer"], []).append(value)
    return dict(sorted(values.items()))


def measured_columns(models: Iterable[Mapping[str, Any]]) -> list[Column]:
    """The `COLUMNS` whose metric was measured for at least one model."""
    models = list(models)
    return [
        column for column in _ALL if any(by_layer(model["runs"], column.name) for model in models)
    ]


def main_columns(models: Iterable[Mapping[str, Any]]) -> list[Column]:
    """The `MAIN` metrics that were measured for at least one model, with stand-ins for others."""
    measured = {column.name: column for column in measured_columns(models)}
    names = [name if name in measured else STAND_INS.get(name, name) for name in MAIN]
    return [measured[name] for name in names if name in measured]
