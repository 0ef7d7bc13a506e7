"""The problem sizes that are measured: real training steps on a GPU, stand-ins that a CPU finishes in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .check import oracle

ROWS = ("index", "mask")  # ways to say which rows take part
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `tokens` tokens, of which `visual` in a row are visual; widths d → m → z."""

    name: str
    batch: int
    tokens: int
    visual: int
    d: int
    m: int
    z: int
    what: str

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def selected(self) -> int:
        return self.batch * self.visual

    @property
    def flop(self) -> int:
        """Of the six products: two of the forward, four of the backward."""
        return 6 * self.selected * self.m * (self.d + self.z)

    @property
    def size(self) -> str:
        return f"{self.selected:,} of {self.rows:,} · {self.d}→{self.m}→{self.z}"


GPU = [
    Shape("llava15-7b-sft", 16, 1024, 576, 4096, 4096, 4096, "LLaVA-1.5-7B, instruction tuning"),
    Shape("qwen25vl-7b", 1, 8192, 5120, 3584, 3584, 3584, "Qwen2.5-VL-7B, packed to 8k"),
    Shape("qwen25vl-7b-small", 1, 1024, 256, 3584, 3584, 3584, "Qwen2.5-VL-7B, one small image"),
    Shape("llava15-7b-pretrain", 32, 640, 576, 4096, 4096, 4096, "LLaVA-1.5-7B, projector pretraining"),
    Shape("llava-next-qwen2-7b", 5, 4096, 2920, 3584, 3584, 3584, "LLaVA-NeXT on Qwen2-7B, five tiles an image"),
    Shape("qwen25vl-3b", 1, 8192, 5120, 2048, 2048, 2048, "Qwen2.5-VL-3B, packed to 8k"),
    Shape("qwen25vl-72b", 1, 8192, 5120, 8192, 8192, 8192, "Qwen2.5-VL-72B, packed to 8k"),
    Shape("qwen3vl-8b", 1, 16384, 9216, 4096, 4096, 4096, "Qwen3-VL-8B, packed to 16k"),
    Shape("qwen3vl-32b", 1, 16384, 9216, 5120, 5120, 5120, "Qwen3-VL-32B, packed to 16k"),
    Shape("qwen3vl-4b", 1, 16384, 9216, 2560, 2560, 2560, "Qwen3-VL-4B, packed to 16k"),
    Shape("internvl3-8b", 1, 16384, 13312, 3584, 3584, 3584, "InternVL3-8B, 52 tiles packed to 16k"),
    Shape("llava15-7b-clip", 16, 1024, 576, 4096, 4096, 1024, "LLaVA-1.5-7B, anchors from the CLIP encoder"),
    Shape("qwen25vl-7b-video", 1, 32768, 24576, 3584, 3584, 3584, "Qwen2.5-VL-7B, long video"),
]

CPU = [
    Shape("cpu-16k", 8, 2048, 1536, 1024, 1024, 1024, "stand-in: 12k visual tokens of width 1024"),
    Shape("cpu-4k-encoder", 4, 1024, 576, 1024, 512, 768, "stand-in: anchors of an encoder, narrow predictor"),
]

TINY = [Shape("tiny", 2, 160, 100, 128, 96, 64, "for the tests of the benchmark itself")]

BY_NAME = {shape.name: shape for shape in GPU + CPU + TINY}


def plan(
    device: torch.device,
    names: Iterable[str] = (),
    dtypes: Iterable[str] = ("bf16", "fp32"),
    rows: Iterable[str] = ("index",),
) -> list[tuple[Shape, str, str]]:
    """(shape, dtype, rows) to measure on `device`, the most telling first; or the shapes of `names` in `dtypes`."""
    if picked := list(names):
        unknown = [name for name in picked if name not in BY_NAME]
        if unknown:
            raise ValueError(f"shape: got {unknown}, want some of {', '.join(BY_NAME)}")
        return [(BY_NAME[name], dtype, kind) for name in picked for dtype in dtypes for kind in rows]
    every = [(shape, "bf16", "index") for shape in (CPU if device.type == "cpu" else GPU)]
    main = every[0][0]
    if device.type == "cpu":
        return [*every, (main, "bf16", "mask"), (main, "fp32", "index")]
    variants = [(main, "bf16", "mask"), (main, "fp16", "index"), (main, "fp32", "index")]
    return [*every[:3], *variants, *every[3:]]


def case(shape: Shape, dtype: torch.dtype, device: torch.device, rows: str = "index", seed: int = 0) -> oracle.Case:
    """Inputs of that size: the visual tokens stand in a row after a short prompt, the upstream gradient is not 1.

    rows: "index" for int64 indices, or "mask" for the same rows as a mask.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    mask = torch.zeros(shape.batch, shape.tokens, dtype=torch.bool, device=device)
    first = min(35, shape.tokens - shape.visual)
    mask[:, first : first + shape.visual] = True
    tensors = {
        "hidden": randn(shape.batch, shape.tokens, shape.d),
        "anchor": randn(shape.batch, shape.tokens, shape.z),
        "w1": randn(shape.m, shape.d) / math.sqrt(shape.d),
        "b1": randn(shape.m) * 0.2,
        "w2": randn(shape.z, shape.m) / math.sqrt(shape.m),
        "b2": randn(shape.z) * 0.2,
    }
    selection = mask if rows == "mask" else mask.reshape(-1).nonzero().squeeze(1)
    return oracle.Case(tensors, selection, upstream=0.37)
