"""The table of evidence shows what its records contain."""

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("rich")

from bench import evidence, record
from pre_kernels.check.device import Cpu

SEEDS = (0, 1, 2)


def records(**raised):
    """Return one for each arm and seed. `raised` maps a metric to what PRe at L/2 adds to it, by
    seed."""
    lines = []
    for arm in (evidence.BEFORE, *evidence.ARMS):
        for seed in SEEDS:
            more = {
                name: by_seed[seed] if arm == evidence.BASE else 0.0
                for name, by_seed in raised.items()
            }
            depth = range(evidence.DEPTH + 1)
            metrics = {
                "accuracy": 0.9 + 0.001 * seed,
                "probe": [0.9 - 0.01 * layer + more.get("probe", 0.0) for layer in depth],
                "contrast": [1.5 + 0.01 * seed + more.get("contrast", 0.0) for _ in depth],
                "cosine": [1.0 - 0.1 * layer for layer in depth],
                "effective_dimension": [20.0 - layer for layer in depth],
                "correlation": [0.1 for _ in depth],
            }
            line = {
                "kind": "evidence",
                "item": f"{arm}, seed {seed}",
                "arm": arm,
                "seed": seed,
                "settings": {},
            }
            lines.append(line | metrics | record.stamp(Cpu()))
    return lines


def line(text, beginning):
    return next(line for line in text.splitlines() if beginning in line)


def test_rows_are_means_over_seeds_and_differences_within_them():
    text = evidence.table(records(probe=(0.02, 0.03, 0.04)))
    cells = [cell.strip() for cell in line(text, f"| {evidence.BASE}").split("|")]
    # 0.9 minus the mean of 0.04 … 0.08, plus 0.03
    assert cells[3] == "0.870 ± 0.010 (+0.030 ± 0.010; 3/3)"
    assert cells[2] == "0.901 ± 0.001 (+0.000 ± 0.000; 0/3)"
    assert "(" not in line(text, f"| {evidence.WITHOUT}")
    assert "over seeds 0, 1, 2. " in text


def test_a_finding_is_judged_by_its_interval():
    text = evidence.table(records(probe=(0.02, 0.03, 0.04), contrast=(0.1, -0.1, 0.02)))
    assert "reproduced (+0.030 ± 0.010, positive in 3 of 3" in line(
        text, "PRe raises the linear probe"
    )
    assert "not shown, within the noise (+0.007 ± 0.101" in line(
        text, "PRe raises the contrast ratio"
    )
    assert "the opposite (-0.030" in line(
        evidence.table(records(probe=(-0.02, -0.03, -0.04))), "PRe raises the linear"
    )
    assert "reproduced (+0.080 ± 0.000" in line(text, "loses what patches show")


def test_only_seeds_with_every_arm_count():
    lines = [one for one in records() if (one["arm"], one["seed"]) != ("mse", 1)]
    assert "over seeds 0, 2. " in evidence.table(lines)
