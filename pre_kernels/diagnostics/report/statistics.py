"""Means, spreads and differences over the seeds of an experiment, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

# With two seeds, Student's t multiplies the standard error by 12.7: such an interval says nothing.
FEWEST_SEEDS = 3


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
    """A difference in words and, with three or more seeds, whether it exceeds the noise between
    them (paired t-test). Two seeds are too few for an interval, and the text says so.

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
    above = sum(change > 0 for change in changes)
    text = f"{text}; positive in {above} of {len(changes)} seeds"
    if len(changes) < FEWEST_SEEDS:
        return f"{text}, too few to tell it from the noise between seeds ({FEWEST_SEEDS} or more)."
    low, high = interval(changes)
    verdict = "within" if low <= 0 <= high else "clear of"
    return (
        f"{text}, {verdict} the noise between seeds (95 % interval of the mean "
        f"{low:+.{digits}f} to {high:+.{digits}f})."
    )


def interval(changes: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of at least `FEWEST_SEEDS` differences (Student's
    t)."""
    from scipy.stats import t

    half = t.ppf(0.975, len(changes) - 1) * stdev(changes) / len(changes) ** 0.5
    return mean(changes) - half, mean(changes) + half


def standard_error(share: float, count: int) -> float:
    """The standard error of a share in 0..1 that was measured on `count` cases (binomial).

    Two successes and two failures are added (Agresti and Coull 1998), since the plain formula says
    0 where all cases agree.
    """
    total = count + 4
    adjusted = (share * count + 2) / total
    return float((adjusted * (1 - adjusted) / total) ** 0.5)
