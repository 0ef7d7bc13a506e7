"""The problem sizes that are measured: real training steps on a GPU, and stand-ins that a CPU
finishes in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from pre_kernels.check.cases import DTYPES, Shape, case

__all__ = ["BY_NAME", "CPU", "DTYPES", "GPU", "ROWS", "TINY", "Shape", "case", "plan"]

# ways to give the rows that take part
ROWS = ("index", "mask")


GPU = [
    Shape("llava15-7b-sft", 16, 1024, 576, 4096, 4096, 4096, "LLaVA-1.5-7B, instruction tuning"),
    Shape("qwen25vl-7b", 1, 8192, 5120, 3584, 3584, 3584, "Qwen2.5-VL-7B, packed to 8k"),
    Shape("qwen25vl-7b-small", 1, 1024, 256, 3584, 3584, 3584, "Qwen2.5-VL-7B, one small image"),
    Shape(
        "llava15-7b-pretrain", 32, 640, 576, 4096, 4096, 4096, "LLaVA-1.5-7B, projector pretraining"
    ),
    Shape(
        "llava-next-qwen2-7b",
        5,
        4096,
        2920,
        3584,
        3584,
        3584,
        "LLaVA-NeXT on Qwen2-7B, five tiles an image",
    ),
    Shape("qwen25vl-3b", 1, 8192, 5120, 2048, 2048, 2048, "Qwen2.5-VL-3B, packed to 8k"),
    Shape("qwen25vl-72b", 1, 8192, 5120, 8192, 8192, 8192, "Qwen2.5-VL-72B, packed to 8k"),
    Shape("qwen3vl-8b", 1, 16384, 9216, 4096, 4096, 4096, "Qwen3-VL-8B, packed to 16k"),
    Shape("qwen3vl-32b", 1, 16384, 9216, 5120, 5120, 5120, "Qwen3-VL-32B, packed to 16k"),
    Shape("qwen3vl-4b", 1, 16384, 9216, 2560, 2560, 2560, "Qwen3-VL-4B, packed to 16k"),
    Shape(
        "internvl3-8b", 1, 16384, 13312, 3584, 3584, 3584, "InternVL3-8B, 52 tiles packed to 16k"
    ),
    Shape(
        "llava15-7b-clip",
        16,
        1024,
        576,
        4096,
        4096,
        1024,
        "LLaVA-1.5-7B, anchors from the CLIP encoder",
    ),
    Shape("qwen25vl-7b-video", 1, 32768, 24576, 3584, 3584, 3584, "Qwen2.5-VL-7B, long video"),
]

CPU = [
    Shape("cpu-16k", 8, 2048, 1536, 1024, 1024, 1024, "stand-in: 12k visual tokens of width 1024"),
    Shape(
        "cpu-4k-encoder",
        4,
        1024,
        576,
        1024,
        512,
        768,
        "stand-in: anchors of an encoder, narrow predictor",
    ),
    Shape("cpu-small", 1, 128, 64, 64, 64, 64, "a first try: 64 visual tokens of width 64"),
]

# One shape for each kind of device with other heads. Their lower bounds have 4, 9 and 9 matmuls.
HEADS = {
    device: [
        replace(s, name=f"{s.name}-{name}", what=f"{s.what}, {what}", **head)
        for name, what, head in (
            ("frozen", "frozen head", {"frozen": True}),
            ("depth-3", "head of three layers", {"depth": 3}),
            ("norm", "layer norm and three layers", {"depth": 3, "norm": "layer"}),
        )
    ]
    for device, s in (("cuda", GPU[0]), ("cpu", CPU[1]))
}

TINY = [Shape("tiny", 2, 160, 100, 128, 96, 64, "for the tests of the benchmark itself")]

BY_NAME = {shape.name: shape for shape in [*GPU, *CPU, *TINY, *HEADS["cuda"], *HEADS["cpu"]]}


def plan(
    device: torch.device,
    names: Iterable[str] = (),
    dtypes: Iterable[str] = ("bf16", "fp32"),
    rows: Iterable[str] = ("index",),
) -> list[tuple[Shape, str, str]]:
    """Return (shape, dtype, rows) to measure on `device`, the most important first, or the shapes
    of `names` in `dtypes`."""
    if picked := list(names):
        unknown = [name for name in picked if name not in BY_NAME]
        if unknown:
            raise ValueError(f"shape: got {unknown}, want some of {', '.join(BY_NAME)}")
        return [
            (BY_NAME[name], dtype, kind) for name in picked for dtype in dtypes for kind in rows
        ]
    if device.type == "cpu":
        main, encoder, small = CPU
        both = [(shape, dtype, "index") for shape in (main, encoder) for dtype in ("bf16", "fp32")]
        others = [(main, "bf16", "mask"), (main, "fp32", "mask"), (main, "fp16", "index")]
        others += [(shape, "bf16", "index") for shape in HEADS["cpu"]]
        return [*both, *others, (small, "fp32", "index"), (small, "bf16", "index")]
    every = [(shape, "bf16", "index") for shape in GPU]
    main = every[0][0]
    variants = [(main, "bf16", "mask"), (main, "fp16", "index"), (main, "fp32", "index")]
    variants += [(shape, "bf16", "index") for shape in HEADS["cuda"]]
    return [*every[:3], *variants, *every[3:]]
