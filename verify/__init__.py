"""Tools for tests and measurements: the oracle, fuzzing, mutants, memory fences, ahead-of-time
compilation, versions. Not part of the wheel."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
