"""The old place of `pre_kernels.diagnostics.LayerCallback`, for one version."""

from pre_kernels._moved import moved

__getattr__ = moved(__name__, {"LayerCallback": "pre_kernels.diagnostics"})
