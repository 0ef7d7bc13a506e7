"""Find the collectives of a step: those that Python starts, and those of DDP, FSDP and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """(the operator, the number of elements that it moves) of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [
                leaf for leaf in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(leaf)
            ]
            self.found.append((func._opname, sum(tensor.numel() for tensor in tensors)))
        return func(*args, **(kwargs or {}))
