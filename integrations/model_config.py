"""Read a model's config: its part for the text model, and the tokens that stand for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Any]  # the arguments of a forward by name


def text_config(config: Any) -> Any:
    """The config of the text model: `get_text_config()`, else `.text_config`, else the whole
    config."""
    get = getattr(config, "get_text_config", None)
    return getattr(config, "text_config", config) if get is None else get()


def token_ids(config: Any, kind: str) -> tuple[int, ...]:
    """The ids in `input_ids` that stand for visual tokens of one kind, "image" or "video"."""
    ids = (getattr(config, f"{kind}_token_{suffix}", None) for suffix in ("id", "index"))
    return tuple(sorted({i for i in ids if isinstance(i, int)}))


def visual_tokens(config: Any, inputs: Inputs) -> Tensor | None:
    """The bool mask (B, T) of image tokens in `input_ids`. None without `input_ids`, or if the
    config names no image token."""
    ids = inputs.get("input_ids")
    tokens = token_ids(config, "image")
    return torch.isin(ids, ids.new_tensor(tokens)) if torch.is_tensor(ids) and tokens else None
