"""The namespace of the operators, `torch.ops.pre_kernels`.

A build for the Kernel Hub has a namespace of its own here, so that several builds and the installed
package can be loaded in one process. The names in this module are those that the Hub's builder
gives to the module it makes.
"""

from __future__ import annotations

import torch

NAMESPACE = "pre_kernels"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """Return the full name of the operator `name`."""
    return f"{NAMESPACE}::{name}"
