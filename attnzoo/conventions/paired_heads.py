"""Heads of differential attention as other code lays them out: two maps of half the width each."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.arguments import check_choice

PAIRINGS = ("neighbours", "halves")


def pair_heads(x: Tensor, pairing: str) -> Tensor:
    """Queries, keys or values as `differential` takes them: two heads become the halves of one.

    x: (batch, 2 · heads, length, width)
    pairing: "neighbours", heads 2h and 2h + 1, as in unilm and in the second version; "halves",
        heads h and h + heads, as in transformers' DiffLlama
    returns: (batch, heads, length, 2 · width)
    raises: ValueError on an odd number of heads
    """
    if x.shape[1] % 2:
        raise ValueError(
            f"x has {x.shape[1]} heads, which cannot be paired: give an even number of them"
        )
    if check_choice("pairing", pairing, PAIRINGS) == "halves":
        return torch.cat(x.chunk(2, 1), -1)
    return torch.cat([x[:, 0::2], x[:, 1::2]], -1)
