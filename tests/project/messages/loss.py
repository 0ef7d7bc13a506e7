"""Mistakes with `fused_pre_loss` and `PreHead`.

Given are a batch of two samples of 10 tokens: `hidden` (2, 10, 64), `anchor` (2, 10, 48) and the
mask `visual` (2, 10) of 7 visual tokens; the predictor `w1` (32, 64), `b1`, `w2` (48, 32), `b2`,
together `weights`; and a `head` of the same widths.
"""

from __future__ import annotations

import torch

from pre_kernels import PreHead, fused_pre_loss, reference

from .mistakes import Mistake


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights() -> tuple[torch.Tensor, ...]:
    return values(32, 64), values(32), values(48, 32), values(48)


GIVEN = {
    "torch": lambda: torch,
    "fused_pre_loss": lambda: fused_pre_loss,
    "reference": lambda: reference,
    "PreHead": lambda: PreHead,
    "hidden": lambda: values(2, 10, 64),
    "anchor": lambda: values(2, 10, 48),
    "visual": lambda: torch.arange(20).view(2, 10) % 3 == 0,
    "weights": weights,
    "w1": lambda: weights()[0],
    "b1": lambda: weights()[1],
    "w2": lambda: weights()[2],
    "b2": lambda: weights()[3],
    "head": lambda: PreHead(64, 32, 48),
}
MISTAKES = [
    Mistake(
        "hidden states as an array",
        "fused_pre_loss(hidden.numpy(), anchor, *weights)",
        "hidden: got ndarray, want a torch.Tensor (torch.as_tensor makes one of a list or an "
        "array)",
        "fused_pre_loss(torch.as_tensor(hidden.numpy()), anchor, *weights)",
    ),
    Mistake(
        "hidden states of integers",
        "fused_pre_loss(hidden.long(), anchor, *weights)",
        "hidden: got dtype torch.int64, want float16, bfloat16, float32 or float64 "
        "(hidden.float() converts it)",
        "fused_pre_loss(hidden.long().float(), anchor, *weights)",
    ),
    Mistake(
        "one row without a leading dimension",
        "fused_pre_loss(hidden[0, 0], anchor[0, :1], *weights)",
        "hidden: got shape (64,), want (..., d) with at least one leading dimension "
        "(hidden[None] has one)",
        "fused_pre_loss(hidden[0, 0][None], anchor[0, :1], *weights)",
    ),
    Mistake(
        "weights transposed",
        "fused_pre_loss(hidden, anchor, w1.T, b1, w2.T, b2)",
        "w1: got shape (64, 32), want (m, d) with d = 64 as hidden's last dimension: the layout of "
        "nn.Linear(64, m).weight and of PreHead(dim=64)",
        "fused_pre_loss(hidden, anchor, w1, b1, w2, b2)",
    ),
    Mistake(
        "biases swapped",
        "fused_pre_loss(hidden, anchor, w1, b2, w2, b1)",
        "b1: got shape (48,), want (m,) = (32,) (in a PreHead m is hidden_dim, z is out_dim)",
        "fused_pre_loss(hidden, anchor, w1, b1, w2, b2)",
    ),
    Mistake(
        "an anchor with fewer tokens",
        "fused_pre_loss(hidden, anchor[:, 1:], *weights)",
        "anchor: got shape (2, 9, 48), want hidden's leading shape + (z,) = (2, 10, 48), or one "
        "row for each selected row = (20, 48)",
        "fused_pre_loss(hidden, anchor, *weights)",
    ),
    Mistake(
        "an anchor of one sample for a mask of both",
        "fused_pre_loss(hidden, anchor[0], *weights, visual)",
        "anchor: got 10 rows, want one for each of the 7 selected rows, or all rows, in hidden's "
        "leading shape",
        "fused_pre_loss(hidden, anchor, *weights, visual)",
    ),
    Mistake(
        "a mask of another length",
        "fused_pre_loss(hidden, anchor, *weights, visual[:, 1:])",
        "rows: got shape (2, 9), want hidden's leading shape = (2, 10)",
        "fused_pre_loss(hidden, anchor, *weights, visual)",
    ),
    Mistake(
        "a mask of integers",
        "fused_pre_loss(hidden, anchor, *weights, visual.long())",
        "rows: got shape (2, 10) of torch.int64, want (N,) flat row indices, or a mask of dtype "
        "bool (rows.bool() is one)",
        "fused_pre_loss(hidden, anchor, *weights, visual.bool())",
    ),
    Mistake(
        "a mask of floats",
        "fused_pre_loss(hidden, anchor, *weights, visual.float())",
        "rows: got dtype torch.float32, want bool (a mask; rows.bool() is one), int32 or int64 "
        "(flat row indices)",
        "fused_pre_loss(hidden, anchor, *weights, visual.bool())",
    ),
    Mistake(
        "an index that is not there",
        "fused_pre_loss(hidden, anchor[0, :2], *weights, torch.tensor([3, 20]))",
        "rows: got indices in 3..20, want 0..19 (hidden has 20 rows; with shape (B, T, d) token t "
        "of sample b is row b * T + t)",
        "fused_pre_loss(hidden, anchor[0, :2], *weights, torch.tensor([3, 19]))",
    ),
    Mistake(
        "an index twice",
        "rows = torch.tensor([3, 5, 3]); fused_pre_loss(hidden, anchor, *weights, rows)",
        "rows: got 3 indices of which 2 are distinct, want no duplicates (rows.unique() has none)",
        "rows = torch.tensor([3, 5, 3]); fused_pre_loss(hidden, anchor, *weights, rows.unique())",
    ),
    Mistake(
        "half-precision hidden states and a float32 head",
        "head(hidden.bfloat16(), anchor)",
        "w1: got dtype torch.float32, want hidden's dtype torch.bfloat16; convert one by "
        ".to(dtype), or use torch.autocast",
        "head.to(torch.bfloat16)(hidden.bfloat16(), anchor)",
    ),
    Mistake(
        "a head of another width than the hidden states",
        "PreHead(48)(hidden, hidden)",
        "w1: got shape (48, 48), want (m, d) with d = 64 as hidden's last dimension: the layout of "
        "nn.Linear(64, m).weight and of PreHead(dim=64)",
        "PreHead(dim=64)(hidden, hidden)",
    ),
    Mistake(
        "a head of another width than the anchors",
        "PreHead(64)(hidden, anchor)",
        "w2: got shape (64, 64), want (z, m), z as anchor's last dimension and m as w1's first, = "
        "(48, 64) (in a PreHead m is hidden_dim, z is out_dim)",
        "PreHead(64, out_dim=48)(hidden, anchor)",
    ),
    Mistake(
        "a head without data",
        'PreHead(64, out_dim=48, device="meta")(hidden, anchor)',
        "w1: got a meta tensor, want a dense one with data",
        "PreHead(64, out_dim=48)(hidden, anchor)",
    ),
    Mistake(
        "a loss by another name",
        'fused_pre_loss(hidden, anchor, *weights, loss="cos")',
        "loss: got 'cos', want one of 'cosine', 'mse', 'smooth_l1', 'gram'",
        'fused_pre_loss(hidden, anchor, *weights, loss="cosine")',
    ),
    Mistake(
        "a width that is not an integer",
        "PreHead(64 / 2)",
        "dim: got 32.0 (float), want a positive int",
        "PreHead(int(64 / 2))",
    ),
    Mistake(
        "a dtype by its name",
        'PreHead(64, dtype="bfloat16")',
        "dtype: got 'bfloat16', want torch.float16, torch.bfloat16, torch.float32 or torch.float64",
        "PreHead(64, dtype=torch.bfloat16)",
    ),
    Mistake(
        "a head of four layers",
        "PreHead(64, depth=4)",
        "depth: got 4, want 1, 2 or 3 layers",
        "PreHead(64, depth=3)",
    ),
    Mistake(
        "a head with dropout",
        "PreHead(64, dropout=0.1)",
        "dropout: got 0.1, want 0: the fused loss keeps no activations, and so no mask of dropped "
        "ones for the backward",
        "PreHead(64, dropout=0)",
    ),
    Mistake(
        "a norm by the name of its module",
        'PreHead(64, norm="LayerNorm")',
        "norm: got 'LayerNorm', want one of 'layer', 'rms'",
        'PreHead(64, norm="layer")',
    ),
    Mistake(
        "a third layer of the second's shape",
        "fused_pre_loss(hidden, anchor, *weights, w3=torch.ones(48, 32))",
        "w3: got shape (48, 32), want (z, m2), z as anchor's last dimension and m2 as w2's first, "
        "= (48, 48) (in a PreHead m is hidden_dim, z is out_dim)",
        "fused_pre_loss(hidden, anchor, *weights, w3=torch.ones(48, 48))",
    ),
    Mistake(
        "two layers without the second's weight",
        "fused_pre_loss(hidden, anchor, w1, b1, None, None)",
        "w1: got shape (32, 64), want (z, d), z as anchor's last dimension and d as hidden's last, "
        "= (48, 64) (in a PreHead m is hidden_dim, z is out_dim)",
        "fused_pre_loss(hidden, anchor, w2 @ w1, None, None, None)",
    ),
    Mistake(
        "the bias of a layer that is left out",
        "fused_pre_loss(hidden, anchor, w2 @ w1, None, None, b2)",
        "b2: got a bias without a w2, want None",
        "fused_pre_loss(hidden, anchor, w2 @ w1, b2, None, None)",
    ),
    Mistake(
        "the scale of a norm without the norm",
        "fused_pre_loss(hidden, anchor, *weights, norm_weight=torch.ones(64))",
        "norm_weight: got a tensor with norm=None, want norm='layer' or 'rms', or None",
        'fused_pre_loss(hidden, anchor, *weights, norm="rms", norm_weight=torch.ones(64))',
    ),
    Mistake(
        "the shift of a norm that has none",
        'fused_pre_loss(hidden, anchor, *weights, norm="rms", norm_bias=torch.ones(64))',
        "norm_bias: got a tensor with norm='rms', want norm='layer', or None",
        'fused_pre_loss(hidden, anchor, *weights, norm="layer", norm_bias=torch.ones(64))',
    ),
    Mistake(
        "a divisor for a sum",
        'fused_pre_loss(hidden, anchor, *weights, normalizer=7, reduction="sum")',
        "normalizer: got one with reduction='sum', want None, or reduction='mean', whose divisor "
        "it replaces",
        'fused_pre_loss(hidden, anchor, *weights, normalizer=7, reduction="mean")',
    ),
    Mistake(
        "weights of rows that are trained",
        "w = torch.ones(2, 10, requires_grad=True)\n"
        "fused_pre_loss(hidden, anchor, *weights, row_weight=w)",
        "row_weight: requires grad, want a constant: row_weight.detach()",
        "w = torch.ones(2, 10, requires_grad=True)\n"
        "fused_pre_loss(hidden, anchor, *weights, row_weight=w.detach())",
    ),
    Mistake(
        "too few weights of rows",
        "fused_pre_loss(hidden, anchor, *weights, row_weight=torch.ones(2))",
        "row_weight: got shape (2,), want (20,), one for each selected row, or hidden's leading "
        "shape (2, 10)",
        "fused_pre_loss(hidden, anchor, *weights, row_weight=torch.ones(2, 10))",
    ),
    Mistake(
        "a capacity that the mask exceeds",
        "fused_pre_loss(hidden, anchor[visual], *weights, visual, capacity=4)",
        "capacity: got 4, want at least the 7 rows that the mask selects",
        "fused_pre_loss(hidden, anchor[visual], *weights, visual, capacity=7)",
    ),
    Mistake(
        "Triton kernels in float64",
        'fused_pre_loss(hidden.double(), anchor, *[w.double() for w in weights], impl="triton")',
        "impl: got 'triton', which cannot run here: float64 has no Triton kernels; want 'torch' or "
        "'auto'",
        'fused_pre_loss(hidden.double(), anchor, *[w.double() for w in weights], impl="torch")',
    ),
    Mistake(
        "float8 without bfloat16",
        'fused_pre_loss(hidden, anchor, *weights, precision="fp8")',
        "precision: got 'fp8' with products in torch.float32, want torch.bfloat16 inputs, "
        "autocast to it, or precision=None",
        "fused_pre_loss(hidden, anchor, *weights, precision=None)",
    ),
    Mistake(
        "a gradient by torch.func",
        "torch.func.grad(lambda h: fused_pre_loss(h, anchor, *weights))(hidden)",
        "fused_pre_loss: does not run under a transform of torch.func; use reference.pre_loss, the "
        "equations in plain PyTorch",
        "torch.func.grad(lambda h: reference.pre_loss(h, anchor, *weights))(hidden)",
    ),
]
