"""The sizes of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Heads of the field, as arguments of `apply_pre`; docs/family.md says more about each work.
HEADS: dict[str, dict[str, Any]] = {
    "pre": {},
    "viral": {"depth": 3, "activation": "silu"},
    "blindvla": {"depth": 3, "norm": "layer", "activation": "silu"},
    "spatial-forcing": {"norm": "layer"},
}


@dataclass(frozen=True)
class Settings:
    """Everything on which a run depends besides its seed and the installed versions."""

    seeds: int = 2  # The runs have the seeds 0 .. seeds - 1.
    weight: float = 0.5  # λ
    layer: int | None = None  # None: half the decoder's depth
    head: str = "pre"  # a key of HEADS

    width: int = 64
    layers: int = 8
    vision_steps: int = 400  # The tower learns to name the digit under a patch.
    text_steps: int = 1000  # The LLM learns to continue source code.
    align_steps: int = 30  # LLaVA's first stage: projector only
    tune_steps: int = 400  # LLaVA's second stage: projector and LLM
    batch: int = 32
    tune_batch: int = 16  # the batch in both of LLaVA's stages
    text_length: int = 64  # in bytes
    text_bytes: int = 2_000_000
    vision_rate: float = 2e-3
    text_rate: float = 3e-3
    # This is a tenth of the text's rate: LLaVA also tunes gently, so that the LLM keeps what it
    # knows.
    align_rate: float = 3e-4
    tune_rate: float = 3e-4
    train_scenes: int = 4000
    test_scenes: int = 500  # Probes and predictors are fitted on as many other scenes.
    readout_steps: int = 200  # for the predictors that are fitted after training

    @property
    def pre_layer(self) -> int:
        return self.layers // 2 if self.layer is None else self.layer


QUICK = Settings(
    vision_steps=100,
    text_steps=80,
    align_steps=20,
    tune_steps=80,
    align_rate=1e-3,
    tune_rate=1e-3,
    test_scenes=200,
    readout_steps=100,
)
