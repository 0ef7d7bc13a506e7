"""Triton kernels with their launchers and shapes; they know no autograd."""
