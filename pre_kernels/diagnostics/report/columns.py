"""The columns of a report that are shown: what each is called, how it is defined and what input it
takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Measure(NamedTuple):
    """A column of `LayerReport.rows()`, as it is shown."""

    column: str
    title: str
    axis: str  # what the numbers are
    formula: str
    needs: str  # the input that measures it
    digits: int = 3  # after the point
    scale: str = "linear"  # of the axis
    share: bool = False  # in 0..1 by definition


_ALL = (
    Measure(
        "linear_probe",
        "Linear probe",
        "test accuracy",
        "share of test items whose class a logistic regression reads from mean-pooled visual tokens (arXiv 2603.20808)",
        "labels, a class for each image",
        share=True,
    ),
    Measure(
        "knn_probe",
        "k-NN probe",
        "test accuracy",
        "the same share for a vote of the nearest neighbours, weighted by exp(cosine / 0.07) (Wu et al. 2018)",
        "labels, a class for each image",
        share=True,
    ),
    Measure(
        "contrast",
        "Semantic contrast ratio",
        "cohesion ÷ coupling",
        "cohesion ÷ coupling; at 1 object borders leave no trace (arXiv 2603.20808)",
        "masks, the patches of each object",
    ),
    Measure(
        "cohesion",
        "Cohesion",
        "mean cosine",
        "mean cosine similarity of two patches of one object",
        "masks, the patches of each object",
    ),
    Measure(
        "coupling",
        "Coupling",
        "mean cosine",
        "mean cosine similarity of patches of two objects of one image",
        "masks, the patches of each object",
    ),
    Measure(
        "spatial_contrast",
        "Spatial contrast",
        "near ÷ far",
        "mean cosine similarity of patches that share a side ÷ that of patches more than a quarter of the image's side "
        "apart: what stands in for the semantic contrast ratio without masks, not a value of it",
        "the grid of the patches",
    ),
    Measure(
        "cosine",
        "Cosine with the anchor",
        "mean cosine",
        "mean over visual tokens of cos(hidden state, anchor): what L_PRe is the negative of, without its predictor",
        "an anchor as wide as the layer",
    ),
    Measure(
        "cka_debiased",
        "CKA with the anchor, debiased",
        "CKA",
        "HSIC(x, y) ÷ √(HSIC(x, x) · HSIC(y, y)) of linear kernels, HSIC unbiased (Kornblith et al. 2019, Song et al. "
        "2012); about 0 for independent features",
        "at least 4 visual tokens and the metric “cka”",
    ),
    Measure(
        "cknna",
        "CKNNA with the anchor",
        "CKNNA",
        "CKA over pairs of tokens that are nearest neighbours in both spaces, on a sample of tokens (Huh et al. 2024)",
        "more visual tokens than neighbours and the metric “cknna”",
    ),
    Measure(
        "effective_dimension",
        "Effective dimension",
        "directions",
        "(Σ λ)² ÷ Σ λ², λ the eigenvalues of the tokens' covariance (participation ratio, arXiv 2603.20808)",
        "tokens that differ and the metric “spectrum”",
        digits=1,
    ),
    Measure(
        "components_90",
        "90 %-variance components",
        "components",
        "the least number of eigenvalues of the covariance that make 90 % of their sum",
        "tokens that differ and the metric “spectrum”",
        digits=1,
    ),
    Measure(
        "correlation",
        "Mean |correlation| of features",
        "mean |correlation|",
        "mean over pairs of features i ≠ j of |C_ij| ÷ √(C_ii C_jj), C the tokens' covariance (arXiv 2603.20808)",
        "tokens that differ and the metric “spectrum”",
        share=True,
    ),
    Measure(
        "norm_mean",
        "Norm of the tokens",
        "mean norm",
        "mean over visual tokens of the Euclidean norm of the hidden state, in its own unit",
        "the metric “spectrum”",
        scale="log",
    ),
    Measure(
        "massive_tokens",
        "Tokens with massive activations",
        "share of tokens",
        "share of tokens with a number above 100 and 1,000 times the median of the token (Sun et al. 2024)",
        "the metric “spectrum”",
        share=True,
    ),
    Measure(
        "lens_share",
        "Logit lens",
        "share of tokens",
        "share of tokens that the model's own head decodes to one of the few most frequent ones (nostalgebraist 2020)",
        "logits, the model's final norm and unembedding",
        share=True,
    ),
)
MEASURES: dict[str, Measure] = {measure.column: measure for measure in _ALL}


def by_layer(runs: Iterable[Iterable[Row]], column: str) -> dict[int, list[float]]:
    """The figures of each layer, in order; a value for each run that has one. Layers without any
    are left out."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for row in run:
            value = row.get(column)
            if value is not None and math.isfinite(value):
                found.setdefault(row["layer"], []).append(value)
    return dict(sorted(found.items()))


def measured(models: Iterable[Mapping[str, Any]]) -> list[Measure]:
    """Those of `MEASURES` that at least one model has a figure of."""
    models = list(models)
    return [m for m in _ALL if any(by_layer(model["runs"], m.column) for model in models)]


def spread(values: Sequence[float] | None, sign: str = "", digits: int = 3) -> str:
    """Mean ± standard deviation over seeds; "–" for None."""
    if values is None:
        return "–"
    text = f"{mean(values):{sign}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"


def effect(
    name: str,
    before: Sequence[float],
    after: Sequence[float],
    names: tuple[str, str] = ("without", "with PRe"),
    digits: int = 3,
) -> str:
    """One difference and, of several seeds, whether it is larger than chance over them explains
    (paired t-test).

    Args:
        name: what is compared.
        before, after: a value for each seed, of the same seeds in the same order; ValueError if
            their numbers differ.
        names: what follows each of the two means.
        digits: after the point.
    """
    changes = [b - a for a, b in zip(before, after, strict=True)]
    means = ", ".join(
        f"{mean(v):.{digits}f} {n}" for v, n in zip((before, after), names, strict=True)
    )
    text = f"{name}: {means}, difference {spread(changes, '+', digits)}"
    if len(changes) < 2:
        return f"{text}."
    low, high = interval(changes)
    verdict = "within" if low <= 0 <= high else "clear of"
    above = sum(change > 0 for change in changes)
    return (
        f"{text}; positive in {above} of {len(changes)} seeds, {verdict} the noise between seeds (95 % interval of "
        f"the mean {low:+.{digits}f} to {high:+.{digits}f})."
    )


def interval(changes: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of at least two differences (Student's t)."""
    from scipy.stats import t

    half = t.ppf(0.975, len(changes) - 1) * stdev(changes) / len(changes) ** 0.5
    return mean(changes) - half, mean(changes) + half
