"""Find the padding tokens of a batch, from each form of attention mask that a forward of
transformers takes.

Nothing in this module waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .notices import Notices

# An additive mask at or below this hides a key: e**-1000 is 0 in every dtype, and no attention bias
# is that large.
HIDDEN = -1000.0


def visible(inputs: Mapping[str, Any], shape: torch.Size, notices: Notices) -> Tensor | None:
    """A bool mask (B, T) that is False for padding. None if the arguments of the forward mark no
    padding.

    As in transformers, `attention_mask` decides if there is one, else `cu_seq_lens_q`, else
    `position_ids`. These tokens are visible:

    - a mask (B, T), or (B, K) with more keys before the tokens: those that are not 0;
    - a mask (B or 1, heads or 1, T or 1, K), True or an addend near 0 where a query attends to a
      key: see `_attended`;
    - a dict of such masks by the type of layer: those visible in at least one of them;
    - cumulative lengths: those in a sequence of more than one token;
    - position ids (B or 1, T), or (4, B, T) with those of the text first: the same, where a
      sequence begins wherever the ids do not increase by 1. (3, B, T) has only M-RoPE, whose ids
      increase differently, so nothing is read from it.

    Args:
        inputs: the forward's arguments.
        shape: (B, T) of `input_ids`.
        notices: gets a warning about a mask of another form, under which all tokens count.
    """
    attention = inputs.get("attention_mask")
    masks = list(attention.values()) if isinstance(attention, Mapping) else [attention]
    masks = [mask for mask in masks if mask is not None]
    if not masks:
        return _in_sequences(inputs, shape)
    shown = None
    for mask in masks:
        kept = _under(mask, shape)
        if kept is None:
            notices.warn("attention mask of another form", what=_described(mask))
        else:
            shown = kept if shown is None else shown | kept.to(shown.device)
    return shown


def _under(mask: Any, shape: torch.Size) -> Tensor | None:
    """The tokens (B, T) that are visible under one mask. None if its form is not known."""
    if not torch.is_tensor(mask):
        return None
    if mask.shape == shape:
        return mask.bool()
    if len(shape) != 2 or mask.dim() not in (2, 4) or mask.shape[-1] < shape[1]:
        return None
    batch, tokens = shape
    if mask.dim() == 2:
        return mask[:, -tokens:].bool() if len(mask) == batch else None
    if len(mask) not in (1, batch) or mask.shape[2] not in (1, tokens):
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return None
    attends = mask[..., -tokens:]
    attends = (attends if mask.dtype == torch.bool else attends > HIDDEN).any(1)
    return (_attended(attends) if mask.shape[2] > 1 else attends[:, 0]).expand(shape)


def _attended(attends: Tensor) -> Tensor:
    """The tokens (B, T), T > 1, that take part in attention, from the pairs of query and key
    (B, T, T).

    A token takes part if another query attends to it. The last token of a sequence is attended to
    only by itself, like padding that may attend to itself. But it attends to other tokens, and no
    later query attends to a token before it. To avoid nan in some kernels, a query without any key
    is sometimes allowed to attend to all keys. A query counts as such if it attends to all keys,
    later ones included, while other queries leave out keys before them.
    """
    tokens = attends.shape[-1]
    place = torch.arange(tokens, device=attends.device)
    whole = attends.all(-1)
    gaps = (attends.tril(-1).sum(-1) < place).any(-1, keepdim=True)
    # The last query of a causal mask also attends to all keys, so it counts as such a query only if
    # the one before it does too.
    ahead = torch.cat([whole[:, :-1], whole[:, -1:] & whole[:, -2:-1]], -1)
    attends = attends & ~(ahead & gaps)[..., None]

    own = attends.diagonal(dim1=-2, dim2=-1)
    by_others, to_others = (attends.sum(dim) > own for dim in (-2, -1))
    first = attends.byte().argmax(-1).where(attends.any(-1), tokens)
    # For each query, the first key that any later query attends to.
    later = F.pad(first[:, 1:], (0, 1), value=tokens)
    earliest = later.flip(-1).cummin(-1).values.flip(-1)
    return by_others | (own & to_others & (earliest >= place))


def _in_sequences(inputs: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """The tokens of packed sequences that are longer than one token."""
    # In a row of one token, that token is a whole sequence and not padding.
    if len(shape) != 2 or shape[1] == 1:
        return None
    ends = inputs.get("cu_seq_lens_q")
    places = inputs.get("position_ids")
    if torch.is_tensor(ends) and ends.dim() == 1:
        # Padded with 0 for tokens before the first sequence and past the last one.
        lengths = F.pad(ends.diff(), (1, 1))
        flat = torch.arange(shape.numel(), device=ends.device, dtype=ends.dtype)
        return (lengths[torch.searchsorted(ends, flat, right=True)] > 1).view(shape)
    if not torch.is_tensor(places) or places.is_floating_point():
        return None
    if places.dim() == 3 and len(places) == 4:
        places = places[0]
    if places.dim() != 2 or places.shape[1] != shape[1] or len(places) not in (1, shape[0]):
        return None
    begins = F.pad(places.diff(dim=-1) != 1, (1, 1), value=True)
    return ~(begins[:, :-1] & begins[:, 1:]).expand(shape)


def _described(mask: Any) -> str:
    return (
        f"{mask.dtype} of shape {tuple(mask.shape)}"
        if torch.is_tensor(mask)
        else f"a {type(mask).__name__}"
    )
