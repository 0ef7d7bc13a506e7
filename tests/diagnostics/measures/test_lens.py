import math

import pytest
import torch

from pre_kernels.diagnostics import LogitLens


def lens(tokens, vocabulary=50, **options):
    """A lens that has seen hidden states which decode to these tokens."""
    found = LogitLens()
    found.update(torch.eye(vocabulary)[torch.tensor(tokens)], lambda h: h, **options)
    return found


def test_known_answers():
    seen = lens([7] * 5 + [3] * 3 + [9, 1])
    assert seen.result(top=1) == (0.5, [7])
    assert seen.result(top=2) == (0.8, [7, 3])
    assert seen.result(top=3) == (0.9, [7, 3, 1])
    assert seen.result(top=40) == (1.0, [7, 3, 1, 9])
    assert lens([4] * 6).result() == (1.0, [4])


def test_equals_the_definition():
    g = torch.Generator().manual_seed(0)
    hidden, unembedding = torch.randn(300, 8, generator=g), torch.randn(8, 30, generator=g)
    tokens = (torch.nn.functional.rms_norm(hidden, (8,)) @ unembedding).argmax(1).tolist()
    counts = sorted((tokens.count(token) for token in set(tokens)), reverse=True)
    seen = LogitLens()
    for part in hidden.split(70):
        seen.update(part, lambda h: torch.nn.functional.rms_norm(h, (8,)) @ unembedding, chunk=16)
    assert seen.result(4).share == sum(counts[:4]) / 300
    assert lens(tokens).result(4) == seen.result(4)
    assert lens([tokens[i] for i in torch.randperm(300)]).result(4) == seen.result(4)


def test_logits_of_all_rows_are_never_there_at_once():
    sizes = []

    def logits(h):
        sizes.append(len(h))
        assert not torch.is_grad_enabled()
        return h

    LogitLens().update(torch.eye(50), logits, chunk=16)
    assert sizes == [16, 16, 16, 2]


def test_merge():
    one, other = lens([1, 1, 2]), lens([2, 2, 3])
    one.merge(other)
    one.merge(LogitLens())
    assert one.result(1) == (0.5, [2])
    assert other.result(1) == (2 / 3, [2])
    empty = LogitLens()
    empty.merge(one)
    assert empty.result(1) == (0.5, [2])


def test_bad_input_names_the_argument_and_counts_nothing():
    seen = lens([1, 2])
    with pytest.raises(ValueError, match="hidden: got no rows so far"):
        LogitLens().result()
    for hidden, logits, error, message in (
        ([1.0], lambda h: h, TypeError, "hidden: got list"),
        (torch.ones(0, 50), lambda h: h, ValueError, r"hidden: got shape \(0, 50\)"),
        (torch.full((2, 50), math.nan), lambda h: h, ValueError, "hidden: got nan"),
        (
            torch.ones(2, 50),
            lambda h: h[0],
            ValueError,
            r"logits: returned \(50,\), want .*\(2, vocabulary\)",
        ),
        (torch.ones(2, 50), lambda h: None, ValueError, "logits: returned NoneType"),
        (torch.ones(2, 50), lambda h: h / 0 - h / 0, ValueError, "logits: returned nan"),
        (
            torch.ones(2, 50),
            lambda h: h[:, :9],
            ValueError,
            "logits: got a vocabulary of 9, want 50, as before",
        ),
    ):
        with pytest.raises(error, match=message):
            seen.update(hidden, logits)
    assert seen.total == 2
    with pytest.raises(ValueError, match="top: got 0"):
        seen.result(0)
    with pytest.raises(ValueError, match="chunk: got 0"):
        seen.update(torch.ones(2, 50), lambda h: h, chunk=0)
