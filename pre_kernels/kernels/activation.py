"""The activations and their derivatives, as device functions for the epilogues of the matrix products."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x), float32."""
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 · (1 + tanh(u)) = sigmoid(2u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    else:
        y = tl.where(x <= 0, 0.0, x)  # so that a NaN stays one
    return y


@triton.jit
def activate_grad(x, ACTIVATION: tl.constexpr):
    """act'(x), float32."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * (1.5957691216057308 + 0.2140644488178315 * x * x)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    else:
        y = tl.where(x > 0, 1.0, 0.0)
    return y
