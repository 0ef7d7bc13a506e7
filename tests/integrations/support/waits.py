"""Find the operators that read the device, which make the host wait for it."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """The operators that read the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(
            word in str(func)
            for word in ("item", "local_scalar", "nonzero", "masked_select", "unique", "aten.equal")
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))
