"""Logit lens: what tokens the visual ones would be decoded to, and how few of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import inputs


class LensSummary(NamedTuple):
    """The few most frequent tokens that rows decode to."""

    share: float
    """Of the rows that decode to one of `tokens`, in 0..1."""
    tokens: list[int]
    """Vocabulary ids, from the most frequent on."""


class LogitLens:
    """The share of hidden states decoded to the few most frequent tokens (logit lens:
    nostalgebraist 2020).

        token(h) = argmax over the vocabulary of logits(h)
        share    = rows whose token is among the `top` most frequent / all rows

    with logits(h) = unembedding(norm(h)), given by the caller: nothing here knows a model. Visual
    tokens that have lost their content decode to the same few meaningless tokens, so the share
    rises to 1; the least is about top / number of distinct tokens. No unit. Unchanged by the order
    of rows; scaling a row changes nothing where the norm undoes it; rotating the feature space
    means nothing here, the vocabulary fixes the axes.

    Memory: 8 bytes for each id of the vocabulary and chunk · vocabulary logits at a time, whatever
    the number of rows.
    """

    def __init__(self) -> None:
        # how many rows decoded to each vocabulary id
        self.counts = torch.zeros(0, dtype=torch.int64)

    @property
    def total(self) -> int:
        """Rows so far."""
        return int(self.counts.sum())

    @torch.no_grad()
    def update(self, hidden: Tensor, logits: Callable[[Tensor], Tensor], chunk: int = 256) -> None:
        """Add rows.

        Args:
            hidden: (N, width), floating point and finite, N > 0.
            logits: (n, width) -> (n, vocabulary), called on at most `chunk` rows, in hidden's
                dtype.

        Raises:
            ValueError, TypeError: naming the argument, what came and what is wanted; then no row of
                `hidden` counts.
        """
        inputs.check_rows("hidden", hidden)
        inputs.check_positive("chunk", chunk)
        self.count(decode(hidden, logits, chunk))

    def check(self, counts: Tensor) -> None:
        """ValueError unless the counts are of the vocabulary of those before."""
        if self.total and len(counts) != len(self.counts):
            raise ValueError(
                f"logits: got a vocabulary of {len(counts)}, want that of before, "
                f"{len(self.counts)}"
            )

    def count(self, counts: Tensor) -> None:
        """Add what `decode` counted."""
        self.check(counts)
        self.counts = counts + self.counts if self.total else counts

    def merge(self, other: LogitLens) -> None:
        """Add the rows that another one saw."""
        if other.total:
            self.count(other.counts)

    def result(self, top: int = 5) -> LensSummary:
        """Of all rows so far; ValueError before the first. Equally frequent tokens: the smaller id
        first."""
        inputs.check_positive("top", top)
        total = self.total
        if not total:
            raise ValueError("hidden: got no rows so far, want at least one before the result")
        order = self.counts.argsort(descending=True, stable=True)[:top]
        tokens = [int(token) for token in order if self.counts[token] > 0]
        return LensSummary(int(self.counts[tokens].sum()) / total, tokens)


@torch.no_grad()
def decode(hidden: Tensor, logits: Callable[[Tensor], Tensor], chunk: int = 256) -> Tensor:
    """How often each id of the vocabulary is the argmax, (vocabulary,), int64 on the CPU."""
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
