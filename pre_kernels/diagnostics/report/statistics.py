"""Means, spreads and differences over the seeds of an experiment, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev


def spread(values: Sequence[float] | None, sign: str = "", digits: int = 3) -> str:
    """The mean ± standard deviation over seeds. "–" for None."""
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
    """A difference in words and, with several seeds, whether it exceeds the noise between them
    (paired t-test).

    Args:
        name: the quantity that is compared.
        before, after: a value for each seed, for the same seeds in the same order.
        names: the text after each of the two means.
        digits: how many digits are printed after the decimal point.

    Raises:
        ValueError: `before` and `after` have different lengths.
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
        f"{text}; positive in {above} of {len(changes)} seeds, {verdict} the noise between seeds "
        "(95 % interval of "
        f"the mean {low:+.{digits}f} to {high:+.{digits}f})."
    )


def interval(changes: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of at least two differences (Student's t)."""
    from scipy.stats import t

    half = t.ppf(0.975, len(changes) - 1) * stdev(changes) / len(changes) ** 0.5
    return mean(changes) - half, mean(changes) + half
