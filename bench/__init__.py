"""Measurements: speed, memory and correctness of the loss beside its baselines, in one run. Not
part of the wheel."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
