"""The arguments of `pre-kernels diagnose` as an object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import METRICS
from .samples import PROMPT


@dataclass(frozen=True)
class Settings:
    """The arguments of `pre-kernels diagnose`, with the same defaults."""

    models: tuple[str, ...]
    images: Path
    masks: Path | None = None
    labels: Path | None = None
    background: tuple[int, ...] = (0, 255)
    layers: tuple[int, ...] | None = None
    metrics: tuple[str, ...] = METRICS
    lens: bool = True
    limit: int | None = None
    maps: int = 3
    prompt: str = PROMPT
    dtype: str = "auto"
    device: str = "cpu"
    seed: int = 0
    trust_remote_code: bool = False
