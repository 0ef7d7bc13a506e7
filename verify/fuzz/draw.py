"""The hypothesis strategy that draws fuzzed cases."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from pre_kernels.checks import ACTIVATIONS, LOSSES, NORMS, REDUCTIONS

from .. import oracle
from .specs import Spec

DTYPES = ("float32", "bfloat16", "float16", "float64")
AUTOCASTS = (None, None, None, "bfloat16", "float16")  # for float32 inputs
PATTERNS = ("random", "all", "one", "empty", "alternating", "runs")
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")
OUTLIERS = ("none", "tokens", "channels")
ANCHORS = ("random", "parallel", "opposite")


@st.composite
def specs(draw: st.DrawFn, impl: str) -> Spec:
    """Cases over all options. Those for the kernels are tiny, since the kernels are interpreted.

    Left out, because the rule cannot hold there:
    - the cosine of a single number: it is a sign, which rounding flips in eager or in ours;
    - a single row with a width of 1, in the vendor's matmuls: autograd passes the same matmul as
      one of columns, which the vendor sums in another order, with half the error;
    - float32 cosines to parallel or opposite anchors, with the Triton matmuls or with three layers
      and the kernels: only the rounding of the predictions is left, and the interpreter's matmuls
      are NumPy's, which at small widths sum in another order than the vendor's, as are its
      activations, which round once more than the vendor's. There test_row_kernels.py compares only
      the row losses with eager's;
    - float32 rows that all have the same prediction, with the kernels: their sums are NumPy's too,
      which adds one row after another. Exact sums are closer than eager's;
    - the norm of one or two numbers: these are signs, and what is left of dH is rounding.
    """
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    maybe = lambda: draw(st.booleans())  # noqa: E731
    on_torch = impl == "torch"
    dtype = pick("float32", *DTYPES if on_torch else DTYPES[:3])
    autocast = pick(*AUTOCASTS) if dtype == "float32" else None
    loss = pick(*LOSSES)
    widths = (3, 1, 2, 5, 7, 16, 31, 37, 64, 127) if on_torch else (3, 1, 2, 7, 16, 17, 37)
    sides = st.sampled_from(
        (7, 1, 2, 3, 5, 13, 31, 67, 131) if on_torch else (7, 1, 2, 3, 5, 13, 31)
    )
    leading = draw(
        st.lists(sides, min_size=1, max_size=3).filter(
            lambda x: math.prod(x) <= (420 if on_torch else 70)
        )
    )
    reduction = pick(*REDUCTIONS)
    rows = pick("all", "mask", "index32", "index64")
    half = "float16" in (dtype, autocast)
    scale = draw(st.integers(-4, 4))
    depth = pick(2, 1, 3)
    by_numpy = impl == "triton" or (impl == "blas" and depth == 3)
    by_numpy &= dtype == "float32" and autocast is None and loss == "cosine"
    anchor = "random" if by_numpy else pick(*ANCHORS)
    pattern = pick(*PATTERNS) if rows != "all" else "all"
    total = math.prod(leading)
    # Such a case may have only one row.
    norm = pick(None, None, *NORMS)
    alone = pattern == "one" or total == 1 or (rows != "all" and total < 12)
    leaves = (*oracle.LEAVES, *oracle.MORE_LEAVES)
    return Spec(
        impl=impl,
        seed=draw(st.integers(0, 2**32 - 1)),
        dtype=dtype,
        autocast=autocast,
        leading=tuple(leading),
        d=pick(*[d for d in widths if d > (norm is not None) * 2 + alone]),
        m=pick(*[m for m in widths if m > 1 or not alone]),
        z=pick(*[z for z in widths if z > 1 or loss != "cosine"]),
        depth=depth,
        norm=norm,
        affine=maybe(),
        loss=loss,
        activation=pick(*ACTIVATIONS),
        reduction=reduction,
        normalizer=pick(None, 37.5, 12.0, 1e-3) if reduction == "mean" else None,
        normalizer_tensor=maybe(),
        bias=(maybe(), maybe()),
        rows=rows,
        pattern=pattern,
        anchor_compact=maybe(),
        anchor_dtype=pick(None, *DTYPES),
        anchor=anchor,
        noise=pick(0.0, 1e-7, 1e-4, 1e-2) if anchor != "random" else 0.0,
        weight=pick(None, "leading", "compact"),
        units=pick(None, "AMX") if on_torch and "bfloat16" in (dtype, autocast) else None,
        scale=scale,
        # Larger values overflow float16 (65504), which leaves little to compare.
        scale_w2=draw(st.integers(-4, min(4, 4 - scale) if half else 4)),
        scale_anchor=draw(st.integers(-4, 4)),
        outliers=pick(*OUTLIERS),
        zero_rows=maybe(),
        constant=pick(False, False, False, True) if on_torch or dtype != "float32" else False,
        layout=pick(*LAYOUTS),
        upstream=pick(1.0, -3.0, 0.37, 1e-3, 1024.0),
        frozen=tuple(draw(st.lists(st.sampled_from(leaves), unique=True, max_size=5)))
        if maybe()
        else (),
        workspace=pick(None, 1, 20_000),
        capacity=pick(None, 0, 3) if rows == "mask" else None,
    )
