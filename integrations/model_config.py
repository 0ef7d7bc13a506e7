"""What a model's config says: which part of it is the text model's, and which tokens stand for
images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Any]  # a forward's arguments by name


def text_config(config: Any) -> Any:
    """The part of a model's config that is the text model's: `get_text_config()`, `.text_config`,
    or all of it."""
    get = getattr(config, "get_text_config", None)
    return getattr(config, "text_config", config) if get is None else get()


def token_ids(config: Any, kind: str) -> tuple[int, ...]:
    """The ids of the tokens that stand for visual tokens of a kind, "image" or "video"."""
    ids = (getattr(config, f"{kind}_token_{suffix}", None) for suffix in ("id", "index"))
    return tuple(sorted({i for i in ids if isinstance(i, int)}))


def visual_tokens(config: Any, inputs: Inputs) -> Tensor | None:
    """Mask (B, T) of the image tokens in `input_ids`; None without ids, or if the config names no
    image token."""
    ids = inputs.get("input_ids")
    tokens = token_ids(config, "image")
    return torch.isin(ids, ids.new_tensor(tokens)) if torch.is_tensor(ids) and tokens else None
