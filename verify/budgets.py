"""Counts the instructions in a kernel's machine code, and compares them with a budget."""

from __future__ import annotations

import re
from typing import NamedTuple

# Budgets for sm_90, as (issued, calls, special, barriers) of `Count`: passes over bfloat16 rows of
# 4,096, matmuls with common tiles, and the kernels that select, sum and scale. `issued` is 6 %
# above the most that triton 3.5, 3.6 and 3.9 make; the others are exactly the most. So one more
# division, a division for each element, or sums that are not taken together go over budget.
BUDGETS = {
    "count_kernel": (420, 0, 0, 2),
    "select_kernel": (200, 0, 0, 15),
    "invert_kernel": (520, 0, 0, 3),
    "divisor_kernel": (790, 0, 0, 2),
    "gather_kernel": (840, 0, 0, 0),
    "gather_kernel zero padding": (750, 0, 0, 0),
    "gather_kernel float8": (3850, 1, 3, 2),
    "gather_kernel layer": (6600, 3, 6, 5),
    "gather_kernel layer float8": (8580, 4, 7, 8),
    "gather_kernel rms": (5050, 3, 6, 2),
    "gather_kernel unit": (4710, 2, 5, 2),
    "activate_kernel gelu": (3020, 0, 16, 0),
    "activate_kernel gelu float8": (5910, 1, 19, 2),
    "activate_kernel gelu_tanh": (2580, 0, 16, 0),
    "activate_kernel silu": (2180, 0, 16, 0),
    "activate_kernel relu": (890, 0, 0, 0),
    "row_loss_kernel cosine": (4140, 4, 9, 11),
    "row_loss_kernel cosine zero padding": (4500, 4, 9, 11),
    "row_loss_kernel cosine float8": (4910, 5, 10, 19),
    "row_loss_kernel mse": (1650, 1, 4, 7),
    "row_loss_kernel smooth_l1": (2190, 1, 4, 7),
    "activate_grad_kernel gelu": (3300, 0, 16, 1),
    "activate_grad_kernel gelu float8": (4570, 1, 19, 5),
    "activate_grad_kernel gelu_tanh": (4060, 0, 16, 1),
    "activate_grad_kernel silu": (3040, 0, 16, 1),
    "activate_grad_kernel relu": (1020, 0, 0, 1),
    "gram_kernel": (3210, 1, 3, 5),
    "scatter_kernel": (620, 0, 0, 3),
    "scatter_norm_kernel layer": (6440, 3, 6, 13),
    "scatter_norm_kernel rms": (4660, 3, 6, 6),
    "scatter_norm_kernel unit": (4440, 3, 6, 6),
    "reduce_kernel": (790, 0, 1, 2),
    "scale_kernel": (1290, 0, 0, 10),
    "quantize_kernel": (2720, 9, 11, 11),
    "matmul_descriptor_kernel 64x128x64": (1730, 0, 11, 39),
    "matmul_descriptor_kernel 64x128x64 transposed": (2570, 0, 11, 39),
    "matmul_descriptor_kernel 128x128x64": (3470, 0, 9, 29),
    "matmul_descriptor_kernel 128x128x64 transposed": (5010, 0, 9, 29),
    "matmul_descriptor_kernel 128x256x64": (4910, 0, 9, 29),
    "matmul_descriptor_kernel 128x256x64 transposed": (8200, 0, 9, 29),
    "weight_grad_descriptor_kernel 64x128x64": (1880, 0, 11, 47),
    "weight_grad_descriptor_kernel 128x128x64": (3780, 0, 9, 37),
    "weight_grad_descriptor_kernel 128x256x64": (5310, 0, 9, 37),
    "matmul_kernel 128x128x16 ieee": (10100, 0, 3, 35),
    "matmul_kernel 128x128x16 tf32": (840, 0, 3, 5),
    "weight_grad_kernel 128x128x16 ieee": (10440, 0, 4, 4),
    "weight_grad_kernel 128x128x16 tf32": (1090, 0, 4, 11),
}


# waits for all matrix instructions except the last group
AHEAD = "WARPGROUP.DEPBAR.LE gsb0, 0x1"


class Count(NamedTuple):
    """The instructions of one kernel."""

    # its number of warps × the instructions of its longest loop, or × all of them without a loop
    issued: int
    # calls of functions inside the kernel: the slow paths of exact divisions and roots
    calls: int
    # reciprocals, roots and powers; each `/` adds one
    special: int
    # A sum along a row takes two; several sums taken together take two in all.
    barriers: int

    def over(self, budget: str) -> bool:
        """Whether any number is above the budget of that name; without one, whether any is above
        0."""
        return any(
            x > most for x, most in zip(self, BUDGETS.get(budget, (0, 0, 0, 0)), strict=True)
        )


def count(disassembly: str, warps: int) -> Count:
    """Counts in the output of `nvdisasm -c`: the kernel and its functions, without the NOPs that
    pad its end."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    branches = [
        (i, re.search(r"\bBRA\b.*`\((\.L_\w+)\)", text)) for i, text in enumerate(instructions)
    ]
    turns = [i + 1 - labels[to[1]] for i, to in branches if to and labels[to[1]] < i]
    whole = sum(not text.startswith("NOP") for text in instructions)
    names = [text.split()[text.startswith("@")] for text in instructions]
    counts = (sum(name.startswith(kind) for name in names) for kind in ("CALL", "MUFU", "BAR"))
    return Count(warps * max(turns, default=whole), *counts)
