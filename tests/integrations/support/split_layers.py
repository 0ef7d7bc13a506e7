"""How tensor parallelism splits a decoder layer."""

from __future__ import annotations

from typing import Any


def column_row() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    column = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    return {n: ColwiseParallel() for n in column} | {
        n: RowwiseParallel() for n in ("self_attn.o_proj", "mlp.down_proj")
    }
