"""The sizes of the real demo, and the stages of its bars."""

from __future__ import annotations

from dataclasses import dataclass

from ..stages import Stage


@dataclass(frozen=True)
class Settings:
    """Everything on which an arm depends besides itself, its seed and the installed versions."""

    llm: str = "smollm2"  # a key of pieces.LLMS
    align_steps: int = 200  # LLaVA's first stage: the projector learns on captions
    tune_steps: int = 240  # LLaVA's second stage: projector and LLM learn a narrow question
    batch: int = 4
    align_rate: float = 1e-3
    tune_rate: float = 1e-4
    head_rate: float = 1e-3
    warmup: int = 20
    bf16: bool = False  # autocast to bfloat16 in training
    test_scenes: int = 150  # of each half of the photographs that no training saw
    every: int = 3  # layers between two that are measured
    penalty: float = 0.01  # the probes' C


# The seconds of a step are those of one thread of an AMD EPYC without AVX-512.
LOAD = Stage("loading", 40.0)
ALIGN = Stage("alignment", 2.9)
TUNE = Stage("instruction tuning", 3.8)
# A step is a scene.
MEASURE = Stage("measuring", 0.45)
