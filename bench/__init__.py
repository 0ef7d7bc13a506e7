"""Measurements: speed, memory and correctness of the loss beside its baselines, in the same run.
This package is not part of the wheel."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
