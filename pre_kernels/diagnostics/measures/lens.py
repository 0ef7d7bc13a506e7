"""Logit lens: which vocabulary tokens the visual tokens decode to, and how few different ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import inputs


class LensSummary(NamedTuple):
    """The few most frequent tokens that rows decode to, and how many rows decode to them."""

    share: float
    """The share of rows that decode to one of `tokens`, in 0..1."""
    tokens: list[int]
    """Vocabulary ids, the most frequent first."""


class LogitLens:
    """The share of hidden states decoded to the few most frequent tokens (logit lens:
    nostalgebraist 2020).

        token(h) = argmax over the vocabulary of logits(h)
        share    = rows whose token is among the `top` most frequent / all rows

    logits(h) = unembedding(norm(h)) comes from the caller, so that nothing here knows a model.
    Visual tokens that have lost their content decode to the same few meaningless tokens, and the
    share rises to 1. Its smallest value is about top / number of distinct tokens. No unit. The
    order of rows changes nothing. Scaling a row changes nothing if the norm undoes it. Rotating the
    feature space is not meaningful here, because the vocabulary fixes the axes.

    Memory: 8 bytes for each id of the vocabulary, and chunk · vocabulary logits at a time, whatever
    the number of rows.
    """

    def __init__(self) -> None:
        # How many rows decoded to each vocabulary id.
        self.counts = torch.zeros(0, dtype=torch.int64)

    @property
    def total(self) -> int:
        """The number of rows so far."""
        return int(self.counts.sum())

    @torch.no_grad()
    def update(self, hidden: Tensor, logits: Callable[[Tensor], Tensor], chunk: int = 256) -> None:
        """Add rows.

        Args:
            hidden: (N, width), floating point and finite, N > 0.
            logits: (n, width) -> (n, vocabulary), called on at most `chunk` rows, in hidden's
                dtype.

        Raises:
            ValueError, TypeError: the message names the argument, what it got and what it needs. No
                row of `hidden` is then counted.
        """
        inputs.check_rows("hidden", hidden)
        inputs.check_positive("chunk", chunk)
        self.count(decode(hidden, logits, chunk))

    def check(self, counts: Tensor) -> None:
        """ValueError unless `counts` has the vocabulary size of earlier counts."""
        if self.total and len(counts) != len(self.counts):
            raise ValueError(
                f"logits: got a vocabulary of {len(counts)}, want {len(self.counts)}, as before"
            )

    def count(self, counts: Tensor) -> None:
        """Add the counts that `decode` returned."""
        self.check(counts)
        self.counts = counts + self.counts if self.total else counts

    def merge(self, other: LogitLens) -> None:
        """Add the rows that another `LogitLens` has seen."""
        if other.total:
            self.count(other.counts)

    def result(self, top: int = 5) -> LensSummary:
        """The share of all rows so far, and its `top` tokens. ValueError if there are no rows. Of
        equally frequent tokens, the smaller id comes first."""
        inputs.check_positive("top", top)
        total = self.total
        if not total:
            raise ValueError("hidden: got no rows so far, want at least one before the result")
        order = self.counts.argsort(descending=True, stable=True)[:top]
        tokens = [int(token) for token in order if self.counts[token] > 0]
        return LensSummary(int(self.counts[tokens].sum()) / total, tokens)


@torch.no_grad()
def decode(hidden: Tensor, logits: Callable[[Tensor], Tensor], chunk: int = 256) -> Tensor:
    """How often each vocabulary id is the argmax of the logits, (vocabulary,), int64 on the CPU."""
    tokens = []
    for rows in hidden.split(chunk):
        scores = logits(rows)
        if not torch.is_tensor(scores) or scores.dim() != 2 or len(scores) != len(rows):
            got = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
            raise ValueError(
                f"logits: returned {got}, want a tensor of shape ({len(rows)}, vocabulary)"
            )
        largest, decoded = scores.max(1)
        if largest.isnan().any():
            raise ValueError("logits: returned nan, want numbers")
        tokens.append(decoded)
        vocabulary = scores.shape[1]
    return torch.bincount(torch.cat(tokens), minlength=vocabulary).cpu()
