"""The old place of `pre_kernels.diagnostics.run`, for one version."""
