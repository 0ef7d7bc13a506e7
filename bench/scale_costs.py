"""What PRe adds to an optimizer step, as formulas of the training's sizes: floating-point
operations, bytes of memory traffic, memory, and messages. docs/scale.md explains them.

Nothing here is measured. This module imports neither torch nor pre_kernels, so it repeats two
constants of the kernels; tests/bench/test_scale.py compares the formulas with what the real code
counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import NamedTuple

MIB = 1 << 20
# The bytes that "blas" and "triton" take by default for the buffers of a chunk, the programs that
# sum columns beside each other, and the rows by which a chunk grows.
WORKSPACE = 544 * MIB
PROGRAMS = 264
CHUNK_MULTIPLE = 128
# The bytes of an element of hidden states and matmuls: bfloat16.
ELEMENT = 2
# Rows of a forward whose cosines are computed for the log with another loss than the cosine.
SAMPLE = 256

# For each strategy, whether weights, gradients and optimizer states are split over the processes.
SPLIT = {
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp": (True, True, True),
    "hsdp": (True, True, True),
}
LOSSES = ("cosine", "mse", "smooth_l1")


class Model(NamedTuple):
    """A decoder: its width, its layers, the elements of the weights that its matmuls read (with the
    output layer), and all parameters. The vision tower is left out."""

    name: str
    dim: int
    layers: int
    weights: int
    parameters: int


def llama(name: str, dim: int, layers: int, inner: int, key_value: int, vocabulary: int) -> Model:
    """Return a decoder with gated MLPs of width `inner`, keys and values of width `key_value`, and
    an output layer that does not share the embeddings."""
    layer = 2 * dim * dim + 2 * dim * key_value + 3 * dim * inner
    weights = layers * layer + vocabulary * dim
    return Model(name, dim, layers, weights, weights + vocabulary * dim)


MODELS = {
    "llava15-7b": llama("LLaVA-1.5-7B", 4096, 32, 11008, 4096, 32064),
    "qwen25vl-7b": llama("Qwen2.5-VL-7B", 3584, 28, 18944, 512, 152064),
    "qwen25vl-72b": llama("Qwen2.5-VL-72B", 8192, 80, 29568, 1024, 152064),
}


class Rates(NamedTuple):
    """The rates for which times are predicted: FLOP per second in matmuls, and bytes per second of
    the memory, of the links in a node and of the network, for each GPU and in one direction."""

    matmul: float = 790e12
    memory: float = 4.3e12
    node: float = 450e9
    network: float = 50e9


# Those of an H200: a large matmul in bfloat16 and a copy, as bench/NOTES.md has them, and the
# nominal rates of NVLink and of a network card of 400 Gbit/s.
H200 = Rates()


@dataclass(frozen=True, kw_only=True)
class Training:
    """An optimizer step of one GPU.

    Attributes:
        tokens: the tokens of the GPU's sequences in the step, of which `visual` are visual tokens.
        sequence: the tokens of a sequence, over which attention runs.
        heads: the layers that PRe reads; each has a head d → m → z of `depth` layers.
        frozen: whether the LLM has no gradients of its own weights (LoRA, or LLaVA's first stage).
        trained: the trained parameters without the heads; None: all of the model, or none if it is
            frozen.
        ranks: the number of GPUs, `node` of them in a node, `tensor` of them for each replica of
            the hidden states (tensor parallel).
        own_group: whether FSDP shards each head by a call of its own, and not with the root.

    Raises:
        ValueError: for a number that does not fit the others.
    """

    model: Model
    tokens: int
    visual: int
    sequence: int
    what: str = ""
    micro_batches: int = 1
    heads: int = 1
    hidden_dim: int | None = None
    out_dim: int | None = None
    depth: int = 2
    loss: str = "cosine"
    frozen_head: bool = False
    frozen: bool = False
    trained: int | None = None
    strategy: str = "ddp"
    ranks: int = 8
    node: int = 8
    tensor: int = 1
    own_group: bool = False
    weight_bytes: int = 2
    gradient_bytes: int = 2
    state_bytes: int = 12

    def __post_init__(self) -> None:
        for name in (
            "tokens", "visual", "sequence", "micro_batches", "heads", "depth", "ranks", "node",
            "tensor",
        ):  # fmt: skip
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name, value in self.model._asdict().items():
            if name != "name":
                _check(value >= 1, name, value, "at least 1")
        _check(self.visual <= self.tokens, "visual", self.visual, f"at most {self.tokens} tokens")
        _check(self.sequence <= self.tokens, "sequence", self.sequence, f"at most {self.tokens}")
        _check(self.depth <= 3, "depth", self.depth, "1, 2 or 3 layers")
        _check(
            self.heads <= self.model.layers,
            "heads",
            self.heads,
            f"at most the model's {self.model.layers} layers",
        )
        _check(self.strategy in SPLIT, "strategy", self.strategy, f"one of {', '.join(SPLIT)}")
        _check(self.loss in LOSSES, "loss", self.loss, f"one of {', '.join(LOSSES)}")
        _check(
            self.node % self.tensor == 0 and self.ranks % self.tensor == 0,
            "tensor",
            self.tensor,
            f"a divisor of {self.node} GPUs in a node and of {self.ranks} ranks",
        )
        _check(
            self.ranks <= self.node or self.ranks % self.node == 0,
            "ranks",
            self.ranks,
            f"whole nodes of {self.node} GPUs; --node sets their size",
        )
        if self.own_group:
            _check(
                self.strategy in ("fsdp", "hsdp", "zero3"),
                "own_group",
                self.strategy,
                "a strategy that shards weights: fsdp, hsdp, zero3",
            )

    @cached_property
    def widths(self) -> tuple[int, ...]:
        m = self.hidden_dim or self.model.dim
        return (self.model.dim, *[m] * (self.depth - 1), self.out_dim or self.model.dim)

    @property
    def inner(self) -> int:
        """The widths between the head's layers, added up."""
        return sum(self.widths[1:-1])

    @property
    def head_weights(self) -> int:
        """The elements of a head's weights."""
        return sum(map(prod, pairwise(self.widths)))

    @property
    def head_parameters(self) -> int:
        """The parameters of a head, with its biases."""
        return self.head_weights + sum(self.widths[1:])

    @property
    def replicas(self) -> int:
        """The GPUs that have different tokens."""
        return self.ranks // self.tensor

    @property
    def shards(self) -> int:
        """The GPUs over which a split tensor is split."""
        return min(self.replicas, self.node // self.tensor) if self.hybrid else self.replicas

    @property
    def hybrid(self) -> bool:
        return self.strategy == "hsdp"

    @property
    def own_parameters(self) -> int:
        """The trained parameters of this GPU's part of the model, without the heads."""
        whole = 0 if self.frozen else self.model.parameters
        return (whole if self.trained is None else self.trained) // self.tensor


def _check(holds: bool, name: str, got: object, want: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {got!r}, want {want}")


def head_flop(training: Training) -> int:
    """Return the floating-point operations of the heads' matmuls on a GPU. The GPUs of a
    tensor-parallel group have the same hidden states and repeat them."""
    matmuls = 2 if training.frozen_head else 3
    flop = 2 * matmuls * training.visual * training.head_weights
    if training.loss != "cosine":
        rows = min(SAMPLE, training.tokens // training.micro_batches)
        flop += 2 * training.micro_batches * rows * training.head_weights
    return training.heads * flop


def model_flop(training: Training, checkpointing: bool = False) -> int:
    """Return those of the decoder on a GPU, with causal attention. A frozen weight has no gradient
    of its own. With activation checkpointing the backward repeats the forward."""
    linear = (4 if training.frozen else 6) + 2 * checkpointing
    # Scores and values take 2 · d FLOP each for a token and half of the sequence.
    attention = (6 + 2 * checkpointing) * training.model.layers * training.model.dim
    each = linear * training.model.weights + attention * training.sequence
    return training.tokens * each // training.tensor


def chunk_rows(training: Training) -> int:
    """Return the most rows of a chunk in the default workspace of "blas" and "triton"."""
    d, *_, z = training.widths
    budget = WORKSPACE - 4 * PROGRAMS * sum(training.widths[1:])
    rows = budget // ((d + 2 * training.inner + z) * ELEMENT)
    return max(CHUNK_MULTIPLE, rows - rows % CHUNK_MULTIPLE)


def several_chunks(training: Training) -> bool:
    """Return whether the visual tokens of a micro-batch need more than one chunk."""
    return training.visual > chunk_rows(training) * training.micro_batches


def pass_bytes(training: Training) -> int:
    """Return the bytes that the passes of the heads between matmuls read and write in a step."""
    d, *_, z = training.widths
    # Gather 2 · d and scatter d for a visual token, and d for each token whose gradient is written.
    rows = training.visual * (3 * d + 5 * training.inner + 3 * z) + training.tokens * d
    scaled = 0
    if not training.frozen_head:
        read = 4 if several_chunks(training) else ELEMENT
        scaled = training.micro_batches * training.head_weights * (read + ELEMENT)
    return training.heads * (rows * ELEMENT + scaled)


def other_bytes(training: Training) -> float:
    """Return the bytes of work on the heads' results outside of the loss: autograd adds dH to the
    gradient from the layers above, micro-batches add up gradients, and Adam updates its share."""
    added = 3.0 * training.tokens * training.model.dim * ELEMENT
    if training.frozen_head:
        return training.heads * added
    _, gradients, states = split_by(training)
    summed = 3 * training.gradient_bytes * (training.micro_batches - 1) / gradients
    update = training.weight_bytes + training.gradient_bytes + 2 * training.state_bytes
    return training.heads * (added + training.head_parameters * (summed + update / states))


def split_by(training: Training) -> tuple[int, int, int]:
    """Return over how many GPUs weights, gradients and optimizer states are split."""
    weights, gradients, states = (
        training.shards if split else 1 for split in SPLIT[training.strategy]
    )
    return weights, gradients, states


def seconds(training: Training, rates: Rates) -> float:
    """Predict the time that the heads' work takes on a GPU in a step, without messages."""
    traffic = pass_bytes(training) + other_bytes(training)
    return head_flop(training) / rates.matmul + traffic / rates.memory


class Memory(NamedTuple):
    """Bytes on a GPU.

    Attributes:
        weights, gradients, states: of the heads, all the time.
        whole: weights and gradients that are gathered while they are used.
        peak: what the calls take beyond the gradients that they return.
        spread: dH of all tokens of a micro-batch, from the heads' backward to that of their layer.
    """

    weights: float
    gradients: float
    states: float
    whole: float
    peak: float
    spread: float


def memory(training: Training) -> Memory:
    """Return the memory that the heads take on a GPU."""
    weights, gradients, states = split_by(training)
    elements = training.heads * training.head_parameters
    trained = 0 if training.frozen_head else elements
    rows = training.visual // training.micro_batches
    sums = 4 * training.head_weights if several_chunks(training) and trained else 0
    dh = rows * training.model.dim * ELEMENT
    whole = 0.0
    if weights > 1:
        # Under the root all heads are gathered at once.
        at_once = 1 if training.own_group or training.strategy == "zero3" else training.heads
        each = training.weight_bytes + (0 if training.frozen_head else training.gradient_bytes)
        whole = at_once * training.head_parameters * each
    return Memory(
        weights=elements * training.weight_bytes / weights,
        gradients=trained * training.gradient_bytes / gradients,
        states=trained * training.state_bytes / states,
        whole=whole,
        peak=WORKSPACE + training.heads * (dh + sums),
        spread=training.heads * training.tokens / training.micro_batches * training.model.dim * 2,
    )
