"""The old place of `pre_kernels.diagnostics.load_samples`, for one version."""

from pre_kernels._moved import moved

__getattr__ = moved(__name__, {"load_samples": "pre_kernels.diagnostics"})
