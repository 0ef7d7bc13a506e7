"""The sizes of the real demo."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Everything on which an arm depends besides itself, its seed and the installed versions."""

    llm: str = "smollm2"  # a key of llms.LLMS
    align_steps: int = 200  # LLaVA's first stage: the projector learns on captions
    tune_steps: int = 240  # LLaVA's second stage: projector and LLM learn a narrow question
    batch: int = 4
    align_rate: float = 1e-3
    tune_rate: float = 1e-4
    head_rate: float = 1e-3
    warmup: int = 20
    bf16: bool = False  # autocast to bfloat16
    test_scenes: int = 150  # for each half of the photographs that no training saw
    lens_scenes: int = 10  # In each half the patches of so many are decoded to words.
    every: int = 3  # layers between two that are measured
    penalty: float = 0.01  # the probes' C
    traced_every: int = 40  # steps of the second stage
    traced_scenes: int = 75  # for each half, along the second stage


QUICK = Settings(
    align_steps=4,
    tune_steps=4,
    batch=2,
    test_scenes=16,
    lens_scenes=1,
    every=10,
    traced_every=4,
    traced_scenes=8,
)
