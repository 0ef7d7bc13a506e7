"""The old import path of `pre_kernels.diagnostics.LayerCallback`, kept for one version."""

from pre_kernels._moved import moved

__getattr__ = moved(__name__, {"LayerCallback": "pre_kernels.diagnostics"})
