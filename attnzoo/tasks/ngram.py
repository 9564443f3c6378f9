"""Character n-grams, smoothed: what counting alone predicts."""

from __future__ import annotations

import torch
from torch import Tensor


class NGram:
    """Witten-Bell smoothing (1991; method C), interpolated: p(c | h) = (count(hc) + types(h) · p(c
    | h')) / (count(h) + types(h)), where types(h) is how many different characters followed h
    and h' is h without its first character; below the unigram, all are equal.

    text: (characters,) tokens below `vocabulary_size`.
    order: characters of an n-gram, the predicted one included.
    """

    def __init__(self, text: Tensor, order: int, vocabulary_size: int) -> None:
        if vocabulary_size**order >= 2**63:
            raise ValueError(
                f"order={order} n-grams of {vocabulary_size} characters have no number of 64 bits; "
                "give a smaller order"
            )
        self.vocabulary_size = vocabulary_size
        self.tables = [self._count(text, n) for n in range(1, order + 1)]

    def bits(self, sequences: Tensor) -> float:
        """Mean bits per character of (sequences, length + 1) tokens, the first of each not
        predicted; a history starts with its sequence."""
        predicted = sequences.shape[1] - 1
        p = torch.full((len(sequences), predicted), 1 / self.vocabulary_size, dtype=torch.float64)
        for n, (grams, counts, histories, totals, types) in enumerate(self.tables, 1):
            # Those that end at a predicted character.
            codes = _codes(sequences, n, self.vocabulary_size)[:, 1 if n == 1 else 0 :]
            first = predicted - codes.shape[1]
            count = _look_up(grams, counts, codes)
            history = codes // self.vocabulary_size
            total, kinds = _look_up(histories, totals, history), _look_up(histories, types, history)
            seen = total > 0
            better = (count + kinds * p[:, first:]) / (total + kinds).clamp(min=1)
            p[:, first:] = torch.where(seen, better, p[:, first:])
        return -p.log2().mean().item()

    def _count(self, text: Tensor, n: int) -> tuple[Tensor, ...]:
        """The n-grams with their counts, and their histories with how many n-grams and how many
        different ones they begin."""
        grams, counts = _codes(text[None], n, self.vocabulary_size)[0].unique(return_counts=True)
        histories, inverse = (grams // self.vocabulary_size).unique(return_inverse=True)
        totals = torch.zeros_like(histories).index_add_(0, inverse, counts)
        return grams, counts, histories, totals, inverse.bincount()


def _codes(tokens: Tensor, n: int, base: int) -> Tensor:
    """Every n-gram of (rows, length) tokens as one number whose last digit is its last token:
    (rows, length - n + 1)."""
    return sum(
        (tokens[:, k : tokens.shape[1] - n + 1 + k] * base ** (n - 1 - k) for k in range(n)),
        torch.zeros((), dtype=torch.long),
    )


def _look_up(known: Tensor, numbers: Tensor, wanted: Tensor) -> Tensor:
    """The number of each wanted code, 0 for one that is not known; `known` is sorted."""
    place = torch.searchsorted(known, wanted.contiguous()).clamp(max=len(known) - 1)
    return torch.where(known[place] == wanted, numbers[place], 0)
