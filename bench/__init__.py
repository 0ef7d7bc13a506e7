"""Measurements: speed, memory and correctness of the loss beside its peers, in one run. Not part of the wheel."""
