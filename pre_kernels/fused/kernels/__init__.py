"""Triton kernels with their launchers and shapes. They do not know autograd."""
