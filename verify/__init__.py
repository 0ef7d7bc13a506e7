"""What tests and measurements stand on: the oracle, fuzzing, mutants, memory fences, compilation
ahead of time, versions. Not part of the wheel."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
