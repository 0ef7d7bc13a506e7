"""How many instructions a kernel's machine code has, and how many the passes over rows may have."""

from __future__ import annotations

import re
from typing import NamedTuple

# Of the passes over bfloat16 rows of 4,096 on sm_90, as `Count` has them. Warp instructions are 6 %
# above the most that triton 3.5, 3.6 and 3.9 make, the others are that most: sums that are no longer
# taken together, a division that is one more, or one for each element, are over.
BUDGETS = {
    "activate_kernel gelu": (3020, 0, 16, 0),
    "activate_kernel gelu_tanh": (2580, 0, 16, 0),
    "activate_kernel silu": (2170, 0, 16, 0),
    "activate_kernel relu": (880, 0, 0, 0),
    "activate_grad_kernel gelu": (3290, 0, 16, 1),
    "activate_grad_kernel gelu_tanh": (4050, 0, 16, 1),
    "activate_grad_kernel silu": (3040, 0, 16, 1),
    "activate_grad_kernel relu": (1020, 0, 0, 1),
    "row_loss_kernel cosine": (4120, 4, 9, 11),
    "row_loss_kernel cosine cleared": (4490, 4, 9, 11),
    "row_loss_kernel mse": (1650, 1, 4, 7),
    "row_loss_kernel smooth_l1": (2220, 1, 4, 7),
    "gather_kernel": (830, 0, 0, 0),
    "scatter_kernel": (650, 0, 1, 3),
}


class Count(NamedTuple):
    """Of one kernel."""

    issued: int  # warp instructions: its warps × those of its longest loop, or × all of them
    calls: int  # of functions in the kernel: slow paths of divisions and roots that are exact
    special: int  # reciprocals, roots and powers; with each `/` comes one
    barriers: int  # a sum along a row has two, or several together

    def over(self, budget: str) -> bool:
        """Whether it is more than a budget of that name, if there is one."""
        return any(x > most for x, most in zip(self, BUDGETS.get(budget, self), strict=True))


def count(disassembly: str, warps: int) -> Count:
    """Of what `nvdisasm -c` prints of a kernel, its functions and all but what fills up its end."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    branches = [(i, re.search(r"\bBRA\b.*`\((\.L_\w+)\)", one)) for i, one in enumerate(instructions)]
    turns = [i + 1 - labels[to[1]] for i, to in branches if to and labels[to[1]] < i]
    whole = sum(not one.startswith("NOP") for one in instructions)
    names = [one.split()[one.startswith("@")] for one in instructions]
    found = (sum(name.startswith(kind) for name in names) for kind in ("CALL", "MUFU", "BAR"))
    return Count(warps * max(turns, default=whole), *found)
