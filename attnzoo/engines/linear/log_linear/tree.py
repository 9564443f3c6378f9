"""The Fenwick tree of a row's past: which bucket holds which token.

Token t, from 0, finds the tokens before it in buckets of a power of 2 each: one for every bit of t
that is set, the largest first. Level 0 is t itself, level l > 0 the bucket of 2^(l-1) tokens. So
the level at which t sees token s is the number of bits of t xor s. Only real tokens of a piece
count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.exponential import softplus
from attnzoo.sequences.ordering import running_maximum
from attnzoo.spec import Input

#: By how much a row weighs each level of its past.
LEVELS = Input("levels", "batch heads queries levels", activation=softplus)


def levels_of(tokens: int) -> int:
    """How many levels a row of so many tokens, itself included, has at most."""
    return buckets_of(tokens - 1) + 1


def buckets_of(tokens: int) -> int:
    """How many buckets, full and empty, hold so many tokens: those of 1, 2, 4 ... tokens."""
    count = 0
    while 1 << count <= tokens:  # in comparisons, which lengths of a graph can take part in
        count += 1
    return count


def positions(call: Call) -> Tensor:
    """How many real tokens of its piece stand before every key, (batch, key_length); of a slot
    that is padded, before the last real one."""
    k, real = call.k, call.key_mask
    real = torch.ones(k.shape[0], k.shape[2], device=k.device).bool() if real is None else real
    count = real.long().cumsum(1)
    if call.segments is not None:
        ids = call.segments
        begins = torch.cat([torch.ones_like(real[:, :1]), ids[:, 1:] != ids[:, :-1]], 1)
        count = count - running_maximum((count - real.long()).masked_fill(~begins, 0))
    return (count - 1).clamp(min=0)


def level_between(places: Tensor, count: int) -> Tensor:
    """The level at which two tokens see each other, (..., length, length).

    places: (..., length), the positions of tokens
    count: how many levels there are
    """
    differ = places[..., :, None] ^ places[..., None, :]
    level = torch.zeros_like(differ)
    for bit in range(count - 1):
        level = level + (differ >= 1 << bit)
    return level


def given_levels(call: Call, tokens: int) -> Tensor:
    """The weights of levels of every row, (batch, heads, query_length, L), in the precision of the
    input; all 1 where the call brings none, and 0 on padding, where rows have no place.

    tokens: of the longest row
    raises: ValueError where there are too few levels for so many tokens
    """
    levels, wanted = call.get(LEVELS.name), levels_of(tokens)
    if levels is None:
        levels = call.q.new_ones(1).expand(*call.q.shape[:3], wanted)
    if levels.shape[3] < wanted:
        most = 1 << max(0, levels.shape[3] - 1)
        raise ValueError(
            f"levels has {levels.shape[3]} of them, enough for {most} tokens, and there are "
            f"{tokens}: give {wanted}, one more for every doubling of the length"
        )
    levels = levels[..., :wanted]
    if call.key_mask is None or call.offset:
        return levels
    return levels.masked_fill(~call.key_mask[:, None, :, None], 0.0)
